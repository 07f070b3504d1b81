#!/bin/sh
# Scores the newest frame of a camera, always, and appends the records to a file.
#
#   usage: [OPTIONS='...'] camera.sh MODEL SCORES INPUT...  OPTIONS of `uadtool score`, INPUT as ffmpeg takes it
#
#   camera.sh unified.onnx scores.jsonl -rtsp_transport tcp -i rtsp://camera/stream
#   camera.sh unified.onnx scores.jsonl -f v4l2 -framerate 10 -i /dev/video0
set -eu
model=$1 scores=$2
shift 2
touch "$scores"
[ -z "$(tail -c 1 "$scores")" ] || echo >> "$scores" # a power failure left half a line
# shellcheck disable=SC2086 # OPTIONS are words
ffmpeg -nostdin -v error "$@" -f image2pipe -c:v mjpeg -q:v 2 - |
    uadtool score "$model" --frames --latest ${OPTIONS:-} >> "$scores"
