#!/bin/sh
# Put what others wrote for the page into service/web/static, with its licences. `make vendor`
set -eu
cd "$(dirname "$0")"
static=../service/web/static
npm ci --ignore-scripts --no-audit --no-fund
chat=$static/deep-chat charts=$static/echarts
mkdir -p "$chat" "$charts"

cp node_modules/deep-chat/dist/deepChat.bundle.js node_modules/deep-chat/LICENSE "$chat"
for name in @microsoft/fetch-event-source remarkable autolinker argparse sprintf-js; do
    printf '%s\n\n' "=== $name"
    cat "node_modules/$name/LICENSE"
    printf '\n'
done >"$chat/bundled-licenses.txt"
printf '%s\n\n%s\n' "=== speech-to-element" "MIT, Ovidijus Parsiunas, as its package.json says" \
    >>"$chat/bundled-licenses.txt"

# comments that state a licence stay in the script
npx esbuild treemap.js --bundle --minify --format=esm --legal-comments=eof \
    --define:process.env.NODE_ENV='"production"' --outfile="$charts/treemap.js"
cp node_modules/echarts/LICENSE node_modules/echarts/NOTICE "$charts"
for file in echarts/licenses/LICENSE-d3 zrender/LICENSE tslib/LICENSE.txt; do
    printf '%s\n\n' "=== $file"
    cat "node_modules/$file"
    printf '\n'
done >"$charts/bundled-licenses.txt"
