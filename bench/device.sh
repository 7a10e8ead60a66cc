#!/usr/bin/env bash
# On a machine with a GPU: builds for it, runs the tests that need one, compute-sanitizer and the benchmarks there, each with
# a limit of its own: about five minutes, ten at most. Logs and tables go to FOLDER; python -m pip needs pybind11, cmake and
# ninja, the tests pytest-xdist, the last step the shared data. VGG-16 at full width is a command of its own, some four
# minutes: python -m bench.paper vgg-16-full-width --device cuda.
#
#     bench/device.sh [FOLDER]     bench/results/<name of the GPU> by default
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python}
name=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr 'A-Z ' 'a-z-')
folder=${1:-bench/results/$name}
mkdir -p "$folder"
failed=0

run() { # LIMIT LOG COMMAND...
    local limit=$1 log=$folder/$2
    shift 2
    echo "== $*"
    timeout "$limit" "$@" >"$log" 2>&1
    local code=$?
    tail -n 4 "$log"
    [ $code -eq 0 ] || { echo "== exit $code: $log" && failed=1; }
}

CMAKE_ARGS=${CMAKE_ARGS:--DMTZ_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=native} \
    run 120 build.txt "$python" -m pip install --no-build-isolation --no-deps .
operators=(neuron_distances sherman_morrison match_neurons conv2d_second_moment)
run 60 tests.txt "$python" -m pytest -q -n 6 -k cuda tests/test_cuda.py tests/test_registration.py \
    "${operators[@]/#/tests/test_}"
run 110 zip.txt "$python" -m pytest -q -n 6 tests/test_cuda_zip.py
for tool in memcheck racecheck synccheck; do
    run 30 "$tool.txt" compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m bench.awkward
done
bench() { # LIMIT OPERATOR...
    run "$1" "$2.txt" "$python" -m bench "${@:2}" --device cuda --csv "$folder/$2.csv"
}
bench 45 neuron_distances
bench 45 sherman_morrison
bench 30 conv2d_second_moment
bench 20 match_neurons --quick
bench 20 overhead
run 80 full-size.txt "$python" -m bench.paper vgg-16-full-size --images 1024 --device cuda \
    --csv "$folder/paper-vgg-16-full-size-1024.csv"
exit $failed
