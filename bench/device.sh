#!/usr/bin/env bash
# On a machine with a GPU: builds for it, runs the operators' tests, compute-sanitizer and the benchmarks there, each with a
# limit of its own, in at most 8 minutes. Logs and tables go to FOLDER; python -m pip needs pybind11, cmake and ninja.
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
run 80 tests.txt "$python" -m pytest -q -k cuda tests/test_cuda.py tests/test_registration.py \
    "${operators[@]/#/tests/test_}"
for tool in memcheck racecheck synccheck; do
    run 30 "$tool.txt" compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m bench.awkward
done
bench() { # LIMIT OPERATOR...
    run "$1" "$2.txt" "$python" -m bench "${@:2}" --device cuda --csv "$folder/$2.csv"
}
bench 60 neuron_distances
bench 50 sherman_morrison
bench 30 conv2d_second_moment
bench 30 match_neurons --quick
bench 20 overhead
exit $failed
