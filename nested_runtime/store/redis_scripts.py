"""The Lua scripts of RedisStore. Each is one atomic step on the keys of one session (one hash slot).

KEYS 1-6: session hash, versions, snapshots, answers, answers by expiry, lease. States lie at <session key>:s:<number>.
Every script may be sent again when its reply was lost: ids drawn by the caller make the second run harmless.
ARGV 1-2: now ("" = the server's clock), seconds after which an idle session expires (0 = never).
"""

from __future__ import annotations

__all__ = ["COMMIT", "DELETE", "DROP", "INFO", "LEASE", "LOCATE", "READ", "RELEASE", "RENEW", "RESERVE", "SNAPSHOT"]
__all__ += ["SWEEP", "UNSNAPSHOT"]

_CLOCK = """
local function whole(x) return string.format('%.0f', x) end
local function exact(x) return string.format('%.6f', x) end
local now = tonumber(ARGV[1])
if not now then
  local t = redis.call('TIME')
  now = tonumber(t[1]) + tonumber(t[2]) / 1000000
end
"""

_SESSION = (
    _CLOCK
    + """
local S, V, N, A, X, L = unpack(KEYS, 1, 6)
local ttl = tonumber(ARGV[2])
local function state(number) return S .. ':s:' .. number end
local function alive()
  local used = redis.call('HGET', S, 'used')
  return used and (ttl == 0 or tonumber(used) + ttl > now)
end
local function head()
  return alive() and tonumber(redis.call('HGET', S, 'head')) or 0
end
local function current(fence)
  local held = redis.call('HMGET', L, 'fence', 'expires')
  return held[1] == fence and tonumber(held[2]) > now
end
local function purge()
  local keys = {S, V, N, A, X, L}
  for _, number in ipairs(redis.call('HKEYS', V)) do keys[#keys + 1] = state(number) end
  redis.call('UNLINK', unpack(keys))
end
local function pinned()
  local found = {}
  for _, snapshot in ipairs(redis.call('HVALS', N)) do found[whole(cjson.decode(snapshot).version)] = true end
  return found
end
local function forget(number)
  redis.call('HDEL', V, number)
  redis.call('UNLINK', state(number))
end
"""
)

# lease ttl, holder id -> {} while held by another, else {fence, expires, does the session exist}
# Fences are the server's microseconds, at least one more than the last: they grow across deletion and leave no trace.
LEASE = (
    _SESSION
    + """
local held, exists = redis.call('HMGET', L, 'fence', 'expires', 'holder'), alive()
if held[2] and tonumber(held[2]) > now then
  if held[3] ~= ARGV[4] then return {} end
  return {held[1], held[2], exists and 1 or 0}
end
if exists then redis.call('HSET', S, 'used', exact(now)) else purge() end
local t = redis.call('TIME')
local fence = whole(math.max(tonumber(held[1] or 0) + 1, tonumber(t[1]) * 1000000 + tonumber(t[2])))
local expires = now + tonumber(ARGV[3])
redis.call('HSET', L, 'fence', fence, 'expires', exact(expires), 'holder', ARGV[4])
redis.call('PEXPIRE', L, whole(tonumber(ARGV[3]) * 1000 + 3600000))
return {fence, exact(expires), exists and 1 or 0}
"""
)

# fence, lease ttl -> expires, or nothing when lost
RENEW = (
    _SESSION
    + """
if not current(ARGV[3]) then return false end
local expires = exact(now + tonumber(ARGV[4]))
redis.call('HSET', L, 'expires', expires)
redis.call('PEXPIRE', L, whole(tonumber(ARGV[4]) * 1000 + 3600000))
if alive() then redis.call('HSET', S, 'used', exact(now)) end
return expires
"""
)

# fence
RELEASE = (
    _SESSION
    + """
if redis.call('HGET', L, 'fence') == ARGV[3] then redis.call('HSET', L, 'expires', 0) end
return 1
"""
)

# KEYS 7: staged state. fence, parent, version record, commit id, retain, byte limit, answer key ("" = none), answer,
# answer ttl, answer limit -> {"ok"} or {why not, ...}
COMMIT = (
    _SESSION
    + """
local staged, fence, parent, record, id = KEYS[7], ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6]
local retain, most, name, answer = tonumber(ARGV[7]), tonumber(ARGV[8]), ARGV[9], ARGV[10]
local function done(...)
  redis.call('UNLINK', staged)
  return {...}
end
if redis.call('HGET', S, 'commit') == id then return done('ok') end
if not current(fence) then return done('lease') end
local found = head()
if found ~= parent then return done('version', whole(found)) end
if name ~= '' then
  local expires = redis.call('ZSCORE', X, name)
  if expires and tonumber(expires) > now then return done('answered') end
end
if redis.call('EXISTS', staged) == 0 then return {'staged'} end
local keep, gone, size = pinned(), {}, redis.call('STRLEN', staged)
for _, number in ipairs(redis.call('HKEYS', V)) do
  if tonumber(number) <= parent + 1 - retain and not keep[number] then
    gone[#gone + 1] = number
  else
    size = size + redis.call('STRLEN', state(number))
  end
end
if size > most then return done('bytes', whole(size)) end
for _, number in ipairs(gone) do forget(number) end
local number = whole(parent + 1)
redis.call('RENAME', staged, state(number))
redis.call('PERSIST', state(number))
redis.call('HSET', V, number, record)
redis.call('HSETNX', S, 'created', exact(now))
redis.call('HSET', S, 'head', number, 'updated', exact(now), 'used', exact(now), 'commit', id)
if name ~= '' then
  for _, old in ipairs(redis.call('ZRANGEBYSCORE', X, '-inf', exact(now))) do redis.call('HDEL', A, old) end
  redis.call('ZREMRANGEBYSCORE', X, '-inf', exact(now))
  while redis.call('ZCARD', X) >= tonumber(ARGV[12]) do redis.call('HDEL', A, redis.call('ZPOPMIN', X)[1]) end
  redis.call('HSET', A, name, answer)
  redis.call('ZADD', X, exact(now + tonumber(ARGV[11])), name)
end
return {'ok'}
"""
)

# number ("" = by snapshot or head), snapshot ("" = none) -> {number, record} or {}
LOCATE = (
    _SESSION
    + """
local found, number = head(), ARGV[3]
if found == 0 then return {} end
if ARGV[4] ~= '' then
  local snapshot = redis.call('HGET', N, ARGV[4])
  if not snapshot then return {} end
  number = whole(cjson.decode(snapshot).version)
elseif number == '' then
  number = whole(found)
end
local record = redis.call('HGET', V, number)
if not record then return {} end
return {number, record}
"""
)

# "versions" | "snapshots" | "answer" [, answer key] -> the records
READ = (
    _SESSION
    + """
if not alive() then return {} end
if ARGV[3] == 'versions' then return redis.call('HVALS', V) end
if ARGV[3] == 'snapshots' then return redis.call('HVALS', N) end
local expires = redis.call('ZSCORE', X, ARGV[4])
if not expires or tonumber(expires) <= now then return {} end
return {redis.call('HGET', A, ARGV[4])}
"""
)

# -> {head record, created, updated, used, versions, snapshots, bytes} or {}
INFO = (
    _SESSION
    + """
local found = head()
if found == 0 then return {} end
local size = 0
for _, number in ipairs(redis.call('HKEYS', V)) do size = size + redis.call('STRLEN', state(number)) end
local times = redis.call('HMGET', S, 'created', 'updated', 'used')
return {redis.call('HGET', V, whole(found)), times[1], times[2], times[3],
  redis.call('HLEN', V), redis.call('HLEN', N), size}
"""
)

# number, snapshot id, snapshot record, limit -> "ok" | "missing" | "limit"
SNAPSHOT = (
    _SESSION
    + """
if not alive() or redis.call('HEXISTS', V, ARGV[3]) == 0 then return 'missing' end
if redis.call('HLEN', N) >= tonumber(ARGV[6]) and redis.call('HEXISTS', N, ARGV[4]) == 0 then return 'limit' end
redis.call('HSET', N, ARGV[4], ARGV[5])
return 'ok'
"""
)

# snapshot id, retain -> was there one
UNSNAPSHOT = (
    _SESSION
    + """
local found = head()
if found == 0 or redis.call('HDEL', N, ARGV[3]) == 0 then return 0 end
local keep = pinned()
for _, number in ipairs(redis.call('HKEYS', V)) do
  if tonumber(number) <= found - tonumber(ARGV[4]) and not keep[number] then forget(number) end
end
return 1
"""
)

# -> did it exist
DELETE = (
    _SESSION
    + """
local existed = alive()
purge()
return existed and 1 or 0
"""
)

# -> "alive", "expired" (and now deleted) or "absent"; forgets expired answers
SWEEP = (
    _SESSION
    + """
if alive() then
  for _, old in ipairs(redis.call('ZRANGEBYSCORE', X, '-inf', exact(now))) do redis.call('HDEL', A, old) end
  redis.call('ZREMRANGEBYSCORE', X, '-inf', exact(now))
  return 'alive'
end
if redis.call('EXISTS', S) == 0 then return 'absent' end
purge()
return 'expired'
"""
)

# The index of a tenant lies in another slot than its sessions. KEYS: names by order, name -> stamp.

# now, name, nonce, limit -> the stamp, or nothing when the tenant is full
RESERVE = (
    _CLOCK
    + """
local known = redis.call('ZSCORE', KEYS[1], ARGV[2])
if not known and redis.call('ZCARD', KEYS[1]) >= tonumber(ARGV[4]) then return false end
local stamp = exact(now) .. ' ' .. ARGV[3]
redis.call('ZADD', KEYS[1], 0, ARGV[2])
redis.call('HSET', KEYS[2], ARGV[2], stamp)
return stamp
"""
)

# now, name, stamp, seconds the stamp must be old -> was it removed. A name reserved since has another stamp and stays.
DROP = (
    _CLOCK
    + """
if redis.call('HGET', KEYS[2], ARGV[2]) ~= ARGV[3] then return 0 end
if tonumber(string.match(ARGV[3], '^[^ ]+')) + tonumber(ARGV[4]) > now then return 0 end
redis.call('ZREM', KEYS[1], ARGV[2])
redis.call('HDEL', KEYS[2], ARGV[2])
return 1
"""
)
