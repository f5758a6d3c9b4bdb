#!/usr/bin/env bash
# The path of somebody new, timed: clone, `make run`, the README's first curl lines, a remembered fact.
# Usage: tools/newcomer.sh [SECONDS_ALLOWED]   (300; with warm package caches, on 2 cores)
set -euo pipefail
allowed=${1:-300}
here=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
folder=$(mktemp -d)
server=
finish() {
	if [ -n "$server" ]; then kill -- "-$server" 2> /dev/null || true; fi
	rm -rf "$folder"
}
trap finish EXIT
begun=$(date +%s.%N)
last=$begun
less() { awk "BEGIN { print $1 - $2 }"; }
step() {
	local now
	now=$(date +%s.%N)
	printf '%7.1f s  %s\n' "$(less "$now" "$last")" "$1"
	last=$now
}

git clone --quiet "$here" "$folder/nested-runtime"
cd "$folder/nested-runtime"
step "git clone"

port=$(python3 -c 'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])')
set -m
env -u PYTHONPATH -u VIRTUAL_ENV make run ARGS="--port $port --data-dir $folder/data" > "$folder/log" 2>&1 &
server=$!
set +m
until [ -e .venv/.installed-serve ]; do
	kill -0 "$server" 2> /dev/null || { cat "$folder/log" >&2; exit 1; }
	sleep 0.2
done
step "make run: install"
until curl --silent --fail "http://127.0.0.1:$port/health" > /dev/null; do
	kill -0 "$server" 2> /dev/null || { cat "$folder/log" >&2; exit 1; }
	sleep 0.2
done
step "make run: the server answers"

# the first bash block of the README with curl in it, as it stands
awk '/^```bash$/ { block = ""; inside = 1; next } /^```$/ { if (inside && block ~ /curl/) { printf "%s", block; exit } inside = 0 } inside { block = block $0 "\n" }' \
	README.md | sed "s/127.0.0.1:8000/127.0.0.1:$port/" > "$folder/lines"
answer=$(bash -euo pipefail "$folder/lines" 2> /dev/null)
step "the README's two requests"
total=$(less "$last" "$begun")
printf '%7.1f s  in all (%s allowed), load %s\n' "$total" "$allowed" "$(cut -d' ' -f1-3 /proc/loadavg)"
reply=$(printf '%s' "$answer" | tr '}' '\n' | grep -o '"content": *"[^"]*"' | tail -1)
echo "           asked what the dog is called: $reply"
case $reply in *Rex*) ;; *) echo "the fact was not remembered" >&2; exit 1 ;; esac
awk "BEGIN { exit !($total <= $allowed) }" || { echo "over $allowed s" >&2; exit 1; }
