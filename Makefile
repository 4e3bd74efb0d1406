# Thin aliases over the `arrowhead` command. Variables are overridden on the command line.
PYTHON    ?= python3
VENV      ?= .venv
# Which build of PyTorch (CPU or CUDA) this names is decided by the package index pip is set to.
TORCH     ?= torch==2.13.0
PLAN      ?= plans/library/tiny-sd3.json
MODEL     ?=
BACKEND   ?= onnxruntime
DTYPE     ?= fp32
# Rows of a transformer call: a number, or least, tuned-for and most, as in BATCH="2 2 8".
BATCH     ?=
OUT       ?= build/$(basename $(notdir $(PLAN)))-$(DTYPE)
STEPS     ?= 28
DELTA     ?= 0.2
HEIGHT    ?=
WIDTH     ?=
JOBS      ?= 2
MODELS    ?= build/models
TRITON    ?= build/triton-server
REQUESTS  ?= 2000
# What `make soak` serves: sd3 and flux are of random weights; tiny-sd3, tiny-flux take longer.
PIPELINES ?= sd3 flux

BIN       := $(VENV)/bin
ARROWHEAD := $(BIN)/arrowhead
READY     := $(VENV)/.arrowhead-ready

# ONNX Runtime's C API headers, 1.21 or newer: those of Debian 13's libonnxruntime-dev, or the include
# folder of a release.
ONNXRUNTIME_INCLUDE_DIR ?= $(patsubst %/onnxruntime_c_api.h,%,$(firstword $(shell \
    grep -lsE '^.define ORT_API_VERSION (2[1-9]|[3-9][0-9])' \
        $(addsuffix /onnxruntime_c_api.h,/usr/local/include/onnxruntime /usr/include/onnxruntime))))
OPERATORS := build/plugins-cpu/libarrowhead_onnxruntime.so
HAS_OPERATORS = $(and $(ONNXRUNTIME_INCLUDE_DIR),$(shell command -v $(CXX) 2> /dev/null))

.PHONY: demo plan engine plugins plugins-cpu triton triton-server soak test test-gpu lint clean

demo: $(READY) $(if $(HAS_OPERATORS),$(OPERATORS))
	$(BIN)/python -m tests.testbed.demo

plan: $(READY)
	@test -n "$(MODEL)" || { echo "make plan: name the model: make plan MODEL=<folder or hub id> PLAN=my-plan.json"; exit 2; }
	$(ARROWHEAD) plan search --model $(MODEL) --output $(PLAN) --delta $(DELTA) \
	    --num-inference-steps $(STEPS) $(if $(HEIGHT),--height $(HEIGHT)) $(if $(WIDTH),--width $(WIDTH))

engine: $(READY)
	$(ARROWHEAD) build --plan $(PLAN) $(if $(MODEL),--model $(MODEL)) --output $(OUT) \
	    --dtype $(DTYPE) --backend $(BACKEND) --verify --fallback \
	    $(if $(BATCH),--batch$(if $(word 2,$(BATCH)),-range) $(BATCH))

# The kernel library. cmake and ninja may be those of the `cuda` extra in $(VENV).
plugins: export PATH := $(abspath $(BIN)):$(PATH)
plugins:
	@for tool in nvcc cmake ninja; do command -v $$tool > /dev/null || { \
	    echo "make plugins: no $$tool on PATH; needs nvcc (the CUDA toolkit, 12.3 or newer), cmake and ninja" \
	        "($(BIN)/pip install '.[cuda]', or apt-get install cmake ninja-build)"; exit 2; }; done
	cmake -S plugins -B build/plugins -G Ninja && cmake --build build/plugins

# The operators for ONNX Runtime on a CPU: one C++ compiler and ONNX Runtime's headers.
plugins-cpu:
	@test -n "$(HAS_OPERATORS)" || { echo "make plugins-cpu: needs a C++ compiler (apt-get install g++) and" \
	    "ONNX Runtime's headers, 1.21 or newer: apt-get install libonnxruntime-dev (Debian 13), or" \
	    "ONNXRUNTIME_INCLUDE_DIR=<the include folder of an ONNX Runtime release>"; exit 2; }
	@$(MAKE) --no-print-directory $(OPERATORS)

$(OPERATORS): $(wildcard plugins/onnxruntime/*.h plugins/onnxruntime/*.cpp plugins/cpu/* plugins/kernels/*.h)
	@mkdir -p $(@D)
	$(CXX) -std=c++17 -O3 -ffp-contract=fast -shared -fPIC -fvisibility=hidden -Wl,-z,defs,-z,nodelete \
	    -isystem $(ONNXRUNTIME_INCLUDE_DIR) plugins/cpu/*.cpp \
	    $(filter-out plugins/onnxruntime/cuda_%,$(wildcard plugins/onnxruntime/*.cpp)) -o $@

# A model repository for Triton, with the plan's engines in it.
triton: engine
	$(ARROWHEAD) triton $(OUT) --output $(MODELS) --backend $(BACKEND)

# A real tritonserver for this machine's CPU, in an environment of its own: tests, bench serve, soak.
triton-server: $(READY)
	$(BIN)/python -m trt_runtime.triton.environment $(TRITON)

soak: triton-server
	@for pipeline in $(PIPELINES); do \
	    OMP_NUM_THREADS=1 $(BIN)/python -m tests.trt_runtime.triton.soak --requests $(REQUESTS) \
	        --pipeline $$pipeline --output build/soak-$$pipeline.json || exit 1; done

# One thread a worker: two workers that each start a thread per core only wait for one another.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not trt" -n $(JOBS) --dist loadfile

# Where there is no nvcc, the tests that need the kernel library say so and are skipped.
test-gpu: $(READY) $(if $(shell command -v nvcc 2> /dev/null),plugins)
	$(BIN)/python -m pytest -m "gpu or trt"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Arrowhead needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3 cannot make a virtual environment: apt-get install python3-venv"; exit 1; }
	@command -v nvidia-smi > /dev/null || $(BIN)/python -m pip install --quiet "$(TORCH)"
	@$(BIN)/python -m pip freeze | grep '^torch==' > $(VENV)/constraints.txt || true
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[test]'
	@touch $@
