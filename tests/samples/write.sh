#!/usr/bin/env bash
# Writes a sample of every file that this version of uadtool leaves behind, for tests/test_compatibility.py. Run it when
# a schema gets a new number, and keep the folders of the old ones:
#
#   tests/samples/write.sh 2
set -euo pipefail
cd "$(dirname "$0")"
mkdir "$1"
cd "$1"
trap 'rm -f teacher.pth' EXIT
python -c "import timm, torch; torch.manual_seed(0)
torch.save(timm.create_model('test_efficientnet').state_dict(), 'teacher.pth')"
uadtool train ../parts -o model.safetensors --method stfpm --teacher test_efficientnet \
    --teacher-weights teacher.pth --image-size 32 --steps 3 > train.json
uadtool calibrate model.safetensors ../parts -o ranges.json > calibrate.json
uadtool quantize model.safetensors --ranges ranges.json -o int8.safetensors > quantize.json
uadtool export int8.safetensors -o int8.onnx > export.json
uadtool score int8.onnx ../parts > scores.jsonl
uadtool bench int8.onnx > bench.json
sed -i 's/"system": "[^"]*"/"system": "Linux"/' -- *.json *.jsonl
uadtool compare scores.jsonl bench.json --format json > compare.json
