#!/bin/sh
# Scores the images that arrive in a folder, and appends their records to a file.
#
#   usage: follow.sh MODEL FOLDER SCORES [OPTION...]        options of `uadtool score`
#
# After a restart, images that arrived meanwhile come first: those that are neither in SCORES nor in SCORES.1, which
# logrotate left.
set -eu
model=$1 folder=$2 scores=$3
shift 3
touch "$scores"
[ -z "$(tail -c 1 "$scores")" ] || echo >> "$scores" # a power failure left half a line
for file in "$scores.1" "$scores"; do
    [ ! -e "$file" ] || cat "$file"
done > "$scores.done"
exec uadtool score "$model" --follow "$folder" --done "$scores.done" "$@" >> "$scores"
