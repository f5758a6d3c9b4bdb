#!/usr/bin/env bash
# Make clients/typescript/session-api.ts anew. Its first line says which document it is made from; a test compares that.
# Usage: tools/typescript.sh PYTHON FOLDER_WITH_NODE_MODULES
set -euo pipefail
python=$1 modules=$2
out=clients/typescript/session-api.ts
document=$(mktemp --suffix=.json)
trap 'rm -f "$document" "$document.ts"' EXIT
"$python" -m tools.openapi > "$document"
"$modules/node_modules/.bin/openapi-typescript" "$document" --output "$document.ts" \
	--root-types --root-types-no-schema-prefix --default-non-nullable=false > /dev/null
{ "$python" -c 'from tools.openapi import digest; print(f"// of the session API {digest()}; make typescript")'; cat "$document.ts"; } > "$out"
