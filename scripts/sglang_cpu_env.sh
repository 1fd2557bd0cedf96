#!/usr/bin/env bash
# Makes an environment in which a real SGLang server and the sglang-router run on a CPU, for the tests and for a trial:
#
#     bash scripts/sglang_cpu_env.sh [DIR]      # DIR: .sglang-cpu in the root of the repository
#     DIR/bin/python -m sglang.launch_server --device cpu --attention-backend torch_native ...
#
# About 70 s and 2.7 GB; a second call does nothing. Needs Python >= 3.11 ($PYTHON names another interpreter). Servers on
# a GPU need none of this: `pip install sglang` in an environment of its own.
#
# SGLang's packages for CUDA are left out, and its pins with them: the versions below are one set that works together.
# Two stubs stand in for what SGLang imports, and on a CPU never calls, from packages that need CUDA.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
DIR="${1:-$ROOT/.sglang-cpu}"
PACKAGES=(
    # First with their dependencies ...
    transformers==5.19.0 tokenizers==0.23.2 fastapi "uvicorn>=0.51" uvloop orjson pyzmq msgspec aiohttp
    requests psutil setproctitle pybase64 pydantic python-multipart partial_json_parser pillow prometheus-client regex
    scipy einops interegular IPython xxhash zstandard watchfiles tqdm tiktoken openai==2.8.0 openai-harmony==0.0.4 gguf
    compressed-tensors==0.18.0 blobfile cloudpickle dill numba==0.65.1 jsonschema soundfile sentencepiece
    datasets==5.2.0 # for sglang.bench_serving
)
WITHOUT_DEPENDENCIES=( # ... then what would bring CUDA, or pin another torch
    triton==3.6.0 xgrammar==0.2.7 apache-tvm-ffi==0.1.11 torchvision==0.28.0 sglang==0.5.23 sglang-router==0.3.2
)

echo "SGLang 0.5.23 and sglang-router 0.3.2 for a CPU: about 70 s, 2.7 GB"
start_environment "${BASH_SOURCE[0]}" "$DIR"
install_cpu_torch
install torch==2.13.0 "${PACKAGES[@]}" # named again, so that no package replaces it
install --no-deps "${WITHOUT_DEPENDENCIES[@]}"

site="$("$DIR/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
# SGLang imports this name where no CUDA is. Nothing else may be defined here: without `rms_norm` it takes torch's.
mkdir "$site/vllm"
touch "$site/vllm/__init__.py"
cat > "$site/vllm/_custom_ops.py" << 'PYTHON'
def rotary_embedding(*args, **kwargs):
    raise NotImplementedError("a stub: vllm is not installed")
PYTHON
# torchvision's own extension, whose operators it gives a meta implementation on import, needs libraries of CUDA. A .pth
# file's imports run at each start of the interpreter, and importing torch then would be slow: so only with torchvision.
cat > "$site/torchvision_stub.py" << 'PYTHON'
import importlib.abc
import sys


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            global library
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, BeforeTorchvision())
PYTHON
echo "import torchvision_stub" > "$site/torchvision_stub.pth"

"$DIR/bin/python" -c 'import sglang_router, torchvision, sglang.srt.server_args' ||
    fail "what was installed in $DIR does not import; see above"
environment_is_complete
