#!/usr/bin/env bash
# Everything that needs a GPU, in one call of nine minutes, from a source tree and without network:
#
#   bench/run_gpu.sh OUT [--only e2e|tests|sanitizer|kernels]...
#
#   e2e        python -m bench.latency.e2e: LLaVA-NeXT-7B and LLaVA-1.5-7B of full size, 11 %, batch 1 and 8, alone on the GPU
#   tests      operator tests on the GPU, graphs, streams, patched models on flash attention, beside
#   sanitizer  compute-sanitizer memcheck, racecheck and synccheck on small shapes
#   kernels    python -m bench.kernels.cuda
#
# A part writes OUT/<part>.txt (benches also .json, row by row) and its line of OUT/summary.json; e2e keeps e2e.jsonl while rows
# are missing: eight files at most. A part that has succeeded is not run again unless --only names it. Without a GPU it is a
# rehearsal: e2e on tiny sizes, contenders of the kernel bench checked on small shapes, and a part that can do nothing says that
# it was skipped and why. Settings: PYTHON (python3), CROP_COMMIT (what results name where there is no git), CROP_CUDA_ARCHS
# (that of the GPU), MAX_JOBS (all cores), TOTAL_SECONDS (530: begins no part in the last 60), E2E_SECONDS (170: begins no row
# in the last 50; called again with --only e2e, it goes on with those that are missing), KERNEL_SECONDS (100, kept for the
# kernels), GEOMETRIES and BATCHES.
set -uo pipefail
cd "$(dirname "$0")/.."
usage() { sed -n '4p' "$0" | cut -c3- >&2; exit 2; }

parts=(e2e tests sanitizer kernels)
[ $# -ge 1 ] && [[ "$1" != -* ]] || usage
mkdir -p "$1" || exit 1
out=$(cd "$1" && pwd)
shift
only=()
while [ $# -gt 0 ]; do
    [ "$1" = --only ] && [ $# -ge 2 ] && [[ " ${parts[*]} " == *" $2 "* ]] || usage
    only+=("$2")
    shift 2
done

python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
export MAX_JOBS=${MAX_JOBS:-$(nproc)}
arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else "")') || exit 1
if [ -n "$arch" ]; then
    CROP_BUILD=cuda CROP_CUDA_ARCHS=${CROP_CUDA_ARCHS:-$arch} "$python" setup.py -q build_ext --inplace > "$out/build.txt" 2>&1 ||
        { tail -20 "$out/build.txt" >&2; exit 1; }
    rm "$out/build.txt"
fi
"$python" -c 'from bench.common import header; print(header())' > "$out/machine.txt"

limited() { timeout -k 5 "$seconds" "$@"; }
skip() {
    echo "skipped: $1"
    return 77
}

# Tests that all skipped themselves prove nothing: so many summaries must say "passed".
passed() { [ "$(grep -c '[0-9] passed' "$out/$1.log")" -ge "$2" ] || { echo "no test has run on the GPU"; return 1; }; }

run_e2e() {
    local sizes=()
    [ -n "$arch" ] || sizes=(--reduce 64 8 --rounds 1 --decode 1)
    # shellcheck disable=SC2086
    limited "$python" -m bench.latency.e2e --geometry ${GEOMETRIES:-llava-next-7b llava-1.5-7b} --batch ${BATCHES:-1 8} \
        --keep 0.11 --time $((seconds - 50)) --json "$out/e2e.json" "${sizes[@]}"
}

run_tests() {
    [ -n "$arch" ] || { skip "no GPU: every test would skip itself"; return; }
    local workers=()
    "$python" -c 'import xdist' 2> /dev/null && workers=(-n 4)
    limited "$python" -m pytest tests/ops tests/csrc/test_kernels.py -k cuda -rs --durations=5 "${workers[@]}" || return
    passed tests 1
}

run_sanitizer() {
    [ -n "$arch" ] || { skip "no GPU"; return; }
    local code=0 tool pids=() more home=${CUDA_HOME:-/usr/local/cuda} sanitizer
    sanitizer=$(PATH="$PATH:$home/bin:$home/compute-sanitizer:/usr/local/cuda/bin" command -v compute-sanitizer) ||
        { skip "compute-sanitizer is not installed"; return; }
    # Every path of every kernel on little data, lengths and indices that lie among them; the tools side by side. Calls of
    # CUDA that fail are the launchers' to report: torch makes some on purpose.
    for tool in memcheck racecheck synccheck; do
        more=()
        [ $tool = memcheck ] && more=(--report-api-errors no)
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$sanitizer" --tool "$tool" "${more[@]}" --error-exitcode 9 \
            "$python" -m pytest tests/csrc/test_kernels.py -k "operators and cuda" --noconftest -p no:cacheprovider \
            > "$out/$tool.log" 2>&1 &
        pids[${#pids[@]}]=$!
    done
    for tool in memcheck racecheck synccheck; do
        wait "${pids[0]}" || code=$?
        pids=("${pids[@]:1}")
        echo "== $tool"
        cat "$out/$tool.log"
        rm "$out/$tool.log"
    done
    [ $code -ne 0 ] && return $code
    passed sanitizer 3
}

run_kernels() { limited "$python" -m bench.kernels.cuda --time $((seconds - 20)) --json "$out/kernels.json"; }

note() { # part, status, seconds
    "$python" - "$out/summary.json" "$@" << 'END'
import json, pathlib, sys
path, part, status, seconds = sys.argv[1:]
path = pathlib.Path(path)
summary = json.loads(path.read_text()) if path.exists() else {}
path.write_text(json.dumps(summary | {part: {"status": status, "seconds": int(seconds)}}, indent=1) + "\n")
END
}
succeeded() { grep -q "\"status\": \"ok\"" <(grep -A1 "\"$1\"" "$out/summary.json" 2> /dev/null); }

# Parts of one group run side by side: the seconds they may take, then their names.
group() {
    local seconds=$1 start=$SECONDS part code status pids=()
    shift
    if [ "$seconds" -lt 60 ]; then # would end after TOTAL_SECONDS
        for part in "$@"; do
            note "$part" "out of time" 0
            echo "$part: out of time, not begun: $seconds s are left; again with --only $part"
        done
        failed=1
        return
    fi
    for part in "$@"; do
        "run_$part" > "$out/$part.log" 2>&1 &
        pids[${#pids[@]}]=$!
    done
    for part in "$@"; do
        wait "${pids[0]}"
        code=$?
        pids=("${pids[@]:1}")
        {
            cat "$out/machine.txt" && echo && cat "$out/$part.log"
            # A bench that was cut off has not printed its table, but written it.
            [ $code -eq 0 ] || [ ! -e "$out/$part.json" ] || { echo && "$python" -m bench.show "$out/$part.json"; }
        } > "$out/$part.new"
        mv "$out/$part.new" "$out/$part.txt"
        rm "$out/$part.log"
        case $code in
            0) status=ok ;;
            77) status=skipped ;;
            124) status="out of time" ;;
            *) status=failed ;;
        esac
        note "$part" "$status" $((SECONDS - start))
        echo "$part: $status, $((SECONDS - start)) s, $out/$part.txt"
        [ $code -eq 0 ] || [ $code -eq 77 ] || { failed=1; tail -5 "$out/$part.txt" >&2; }
    done
}

todo=()
for part in "${only[@]:-${parts[@]}}"; do
    if [ ${#only[@]} -eq 0 ] && succeeded "$part"; then
        echo "$part: done before"
    else
        todo+=("$part")
    fi
done
asked() { [[ " ${todo[*]} " == *" $1 "* ]]; }

failed=0 total=${TOTAL_SECONDS:-530}
# Times are taken while nothing else runs; the checks may share the GPU.
asked e2e && group $((total - SECONDS < ${E2E_SECONDS:-170} ? total - SECONDS : ${E2E_SECONDS:-170})) e2e
checks=()
asked tests && checks+=(tests)
asked sanitizer && checks+=(sanitizer)
reserve=0
asked kernels && reserve=${KERNEL_SECONDS:-100}
[ ${#checks[@]} -eq 0 ] || group $((total - SECONDS - reserve)) "${checks[@]}"
asked kernels && group $((total - SECONDS)) kernels
rm "$out/machine.txt"
exit $failed
