#!/bin/bash
# Score images for hours on a Jetson where `make deploy` installed uadtool, and show each minute here.
#
#   bash examples/jetson/soak.sh user@host line.engine data HOURS > soak.jsonl
#
# MODEL and IMAGES are paths in REMOTE, the folder on the device. The device goes on when the connection breaks: the same
# command shows all minutes again and waits for the rest. Remove REMOTE/soak.jsonl to start anew. The exit code is 0 if
# the verdict is good.
JETSON=$1 MODEL=$2 IMAGES=$3 HOURS=$4
REMOTE=${REMOTE:-uadtool}
SSH=${SSH:-ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=30}
if [ $# != 4 ]; then
	sed -n '2,/^[^#]/s/^# \?//p' "$0" >&2
	exit 2
fi
$SSH "$JETSON" "cat > $REMOTE/soak.py" < "$(dirname "$0")"/soak.py || {
	echo "cannot log in to $JETSON, or it has no folder $REMOTE; run make deploy first" >&2
	exit 1
}
$SSH "$JETSON" "cd $REMOTE && if ! test -e soak.jsonl; then
	setsid nohup .venv/bin/python soak.py '$MODEL' '$IMAGES' '$HOURS' $SOAK_OPTIONS > soak.jsonl 2> soak.log < /dev/null &
	echo \$! > soak.pid
fi"
last=$(mktemp)
trap 'rm -f "$last"' EXIT
$SSH "$JETSON" "cd $REMOTE
	tail -n +1 -f soak.jsonl & tail=\$!
	while kill -0 \$(cat soak.pid) 2> /dev/null; do sleep 1; done
	sleep 1
	kill \$tail
	grep -q '\"type\": \"verdict\"' soak.jsonl || tail -n 3 soak.log >&2" | tee "$last"
tail -n 1 "$last" | grep -q '"type": "verdict", "ok": true'
