#!/bin/sh
# Runs a command for each anomalous image, with its record on stdin, and repeats the command until it succeeds.
#
#   usage: [FILTER='...'] [TOLD=FILE] alarm.sh SCORES COMMAND...        FILTER for jq; by default: select(.anomalous)
#
#   alarm.sh scores.jsonl mosquitto_pub -h broker -t line/anomalous -q 1 -s
#   alarm.sh scores.jsonl curl -sSf -H 'Content-Type: application/json' --data-binary @- http://plc/alarm
#
# It starts with the images that are scored from now on. TOLD (SCORES.told) names the last one that it told of. After a
# restart it goes on behind that, so an alarm may come twice, but none is lost.
set -eu
scores=$1
shift
told=${TOLD:-$scores.told}
[ -n "$(jq -r '.time // empty' "$told" 2> /dev/null)" ] ||
    date -u '+{"time": "%Y-%m-%dT%H:%M:%S.000Z", "path": ""}' > "$told"
# shellcheck disable=SC2016 # $told is of jq
new='select(.time > $told.time or (.time == $told.time and .path != $told.path))'
{ cat "$scores.1" 2> /dev/null || :; tail -n +1 -F "$scores" 2> /dev/null; } |
    jq --unbuffered -cR --argjson told "$(cat "$told")" "fromjson? | $new | ${FILTER:-select(.anomalous)}" |
    while IFS= read -r record; do
        until printf %s "$record" | "$@"; do
            sleep 5
        done
        { printf '%s\n' "$record" | jq -c '{time, path}' > "$told.new" && mv "$told.new" "$told"; } || : # a full disk
    done
