# make run      install what is missing, build, generate with the shipped model
# make test     install what is missing, build, run every test
# make          build build/mlora, build/libmlora.a, build/libmlora.so and build/libmlora_kernels.so
# make asan     the same tests under AddressSanitizer and UBSan
# make fuzz     fuzzing programs, with clang
# make check    formatting, static analysis, who includes whom
# make test-torch   the Python module for PyTorch (needs torch; PYTHON=python3)
# make cuda-report   registers and spills of every CUDA kernel
# make format   format all sources
# make profile-ncu   Nsight Compute's reports of the kernels of a decode step, to build/ncu
# make install  PREFIX=/usr/local DESTDIR=

BUILD   ?= build
PREFIX  ?= /usr/local
VERSION := 0.1.0
ifeq ($(origin CC),default)
CC      := gcc
endif
ifeq ($(origin CXX),default)
CXX     := g++
endif

CFLAGS   ?= -O3 -g
SANITIZE ?=
WARN     := -Wall -Wextra -Wpedantic -Wshadow -Wstrict-prototypes -Wmissing-prototypes
FLAGS    := -std=c11 -D_GNU_SOURCE -I. -fPIC -fvisibility=hidden -pthread $(WARN) $(CFLAGS) $(SANITIZE)
LIBS     := -ljansson -lpcre2-8 -lutf8proc -lm -lpthread

# make V=1 shows the commands
Q := $(if $(V),,@)

# ---- sources --------------------------------------------------------------------------------

LIB_C   := $(wildcard engine/*.c engine/base/*.c kernels/*.c kernels/cpu/*.c model/*.c tokenizer/*.c lora/*.c)
TOOLS_C := $(wildcard tools/*.c tools/bench/*.c)
SUITES  := $(patsubst tests/%/,%,$(sort $(dir $(wildcard tests/*/test_*.c))))
SUITES  := $(filter-out api,$(SUITES))
EXAMPLES := $(patsubst tools/examples/%.c,%,$(wildcard tools/examples/*.c))

NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
ifneq ($(NVCC),)
CUDA_CU := $(wildcard kernels/cuda/*.cu)
endif
ifneq ($(CUDA_CU),)
CUDA_HOME  := $(patsubst %/bin/,%,$(dir $(realpath $(NVCC))))
# CUDA_ARCH: names such as "80 90a", or all; by default the GPU that is here, else sm_80 and sm_90a
ifndef CUDA_ARCH
CUDA_ARCH  := $(patsubst 90,90a,$(sort $(subst .,,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null))))
CUDA_ARCH  := $(filter 8% 9% 10% 11% 12%,$(CUDA_ARCH))
CUDA_ARCH  := $(if $(CUDA_ARCH),$(CUDA_ARCH),80 90a)
endif
ifeq ($(CUDA_ARCH),all)
CUDA_CODE  := $(foreach a,80 86 89 90a 100 120,-gencode=arch=compute_$(a),code=sm_$(a)) \
              -gencode=arch=compute_120,code=compute_120
else ifneq ($(findstring -gencode,$(CUDA_ARCH)),)
CUDA_CODE  := $(CUDA_ARCH)
else
CUDA_CODE  := $(foreach a,$(patsubst 90,90a,$(CUDA_ARCH)),-gencode=arch=compute_$(a),code=sm_$(a))
endif
NVCC_FLAGS := -std=c++17 -O3 -lineinfo -I. $(CUDA_CODE) -DMLORA_CUDA_LIB='"$(CUDA_HOME)/lib64"' \
              -Xcompiler -fPIC,-fvisibility=hidden,-fno-exceptions,-fno-threadsafe-statics,-fno-gnu-unique,-Wall,-Wextra
LIBS += -L$(CUDA_HOME)/lib64 -lcudart_static -ldl -lrt
else
LIB_C += $(wildcard kernels/cuda/none.c)
endif

# The kernels alone, behind kernels/mlora_kernels.h.
KERNELS_C := $(wildcard kernels/abi/*.c kernels/cpu/*.c) $(filter kernels/cuda/none.c,$(LIB_C)) \
             engine/base/error.c engine/base/file.c engine/base/buffer.c
KERNELS_O := $(KERNELS_C:%.c=$(BUILD)/obj/%.o) $(CUDA_CU:%.cu=$(BUILD)/obj/%.cu.o)
KERNELS_LIBS := $(filter-out -ljansson -lpcre2-8 -lutf8proc,$(LIBS))

LIB_O   := $(LIB_C:%.c=$(BUILD)/obj/%.o) $(CUDA_CU:%.cu=$(BUILD)/obj/%.cu.o)
TOOLS_O := $(TOOLS_C:%.c=$(BUILD)/obj/%.o)
SUPPORT_O := $(BUILD)/obj/tests/support.o

# ---- build ----------------------------------------------------------------------------------

.PHONY: all setup run test unit-test api-test test-cuda test-torch cuda-report asan check format install clean note fuzz
.SECONDARY:

all: note $(BUILD)/mlora $(BUILD)/libmlora.a $(BUILD)/libmlora.so $(BUILD)/libmlora_kernels.so

note:
ifeq ($(NVCC),)
	@echo "mlora: no nvcc found: building the CPU backend only"
endif

setup:
	@./tools/install-packages test

$(BUILD)/obj/%.o: %.c Makefile
	@mkdir -p $(@D)
	@echo "cc   $<"
	$(Q)$(CC) $(FLAGS) -DMLORA_VERSION='"$(VERSION)"' -MMD -MP -c $< -o $@

$(BUILD)/obj/%.cu.o: %.cu Makefile
	@mkdir -p $(@D)
	@echo "nvcc $<"
	$(Q)$(NVCC) $(NVCC_FLAGS) -MD -MP -c $< -o $@

# One relocatable object in which only mlora_* is global: nothing else leaves the library.
$(BUILD)/libmlora.a: $(LIB_O)
	@echo "ar   $@"
	$(Q)ld -r -o $(BUILD)/obj/libmlora.o $^
	$(Q)objcopy --localize-hidden $(BUILD)/obj/libmlora.o
	$(Q)rm -f $@ && ar rcs $@ $(BUILD)/obj/libmlora.o

$(BUILD)/libmlora.so: $(LIB_O)
	@echo "ld   $@"
	$(Q)$(CC) -shared -Wl,-soname,libmlora.so.0 $(SANITIZE) -o $@.0 $^ $(LIBS)
	$(Q)ln -sf libmlora.so.0 $@

$(BUILD)/libmlora_kernels.so: $(KERNELS_O)
	@echo "ld   $@"
	$(Q)$(CC) -shared -Wl,-soname,libmlora_kernels.so.1 $(SANITIZE) -o $@.1 $^ $(KERNELS_LIBS)
	$(Q)ln -sf libmlora_kernels.so.1 $@

$(BUILD)/mlora: $(TOOLS_O) $(LIB_O)
	@echo "ld   $@"
	$(Q)$(CC) $(SANITIZE) -o $@ $^ -ledit $(LIBS)

$(BUILD)/examples/%: tools/examples/%.c $(BUILD)/libmlora.a
	@mkdir -p $(@D)
	@echo "cc   $<"
	$(Q)$(CC) -std=c99 -Wall -Wextra -Wpedantic -I. $(CFLAGS) $(SANITIZE) -o $@ $< $(BUILD)/libmlora.a $(LIBS)

# ---- run and test ---------------------------------------------------------------------------

MODEL := tests/fixtures/tiny-llama2

run:
	@./tools/install-packages build
	@$(MAKE) --no-print-directory -s -j$$(nproc) all
	./$(BUILD)/mlora generate --model $(MODEL) --temperature 0 --escape \
	    --adapters sql=$(MODEL)/adapters/sql,mood=$(MODEL)/adapters/mood,spanish=$(MODEL)/adapters/spanish \
	    --prompt 'There was once a' \
	    --adapter sql --prompt 'How many owls live near the bridge?\n' \
	    --adapter mood --prompt 'Rosa the owl smiled by the meadow.\n' \
	    --adapter spanish --prompt 'Tess the hedgehog lives near the windmill.\n'

test: setup
	@$(MAKE) --no-print-directory -j$$(nproc) all $(SUITES:%=$(BUILD)/tests/%) $(EXAMPLES:%=$(BUILD)/examples/%)
	@$(MAKE) --no-print-directory api-test
	@$(MAKE) --no-print-directory unit-test

unit-test: $(SUITES:%=$(BUILD)/tests/%)
	@MLORA_BIN=$(BUILD)/mlora ./tests/run -- $(SUITES:%=$(BUILD)/tests/%)

# The public header alone, as C99 and as C++, against the archive and the shared library.
api-test: $(BUILD)/libmlora.a $(BUILD)/libmlora.so $(BUILD)/libmlora_kernels.so
	@mkdir -p $(BUILD)/tests
	$(Q)$(CC) -std=c99 -Wall -Wextra -Wpedantic -I. $(SANITIZE) tests/api/test_embed.c -o $(BUILD)/tests/embed-c $(BUILD)/libmlora.a $(LIBS)
	$(Q)$(CXX) -std=c++11 -Wall -Wextra -Wpedantic -I. $(SANITIZE) -x c++ tests/api/test_embed.c -x none -o $(BUILD)/tests/embed-c++ $(BUILD)/libmlora.so -Wl,-rpath,$(abspath $(BUILD)) $(LIBS)
	$(Q)$(CC) -std=c99 -Wall -Wextra -Wpedantic -I. $(SANITIZE) tests/api/test_kernels.c -o $(BUILD)/tests/kernels-c $(BUILD)/libmlora_kernels.so -Wl,-rpath,$(abspath $(BUILD)) -lm
	$(Q)$(CXX) -std=c++11 -Wall -Wextra -Wpedantic -I. $(SANITIZE) -x c++ tests/api/test_kernels.c -x none -o $(BUILD)/tests/kernels-c++ $(BUILD)/libmlora_kernels.so -Wl,-rpath,$(abspath $(BUILD)) -lm
	$(Q)$(BUILD)/tests/embed-c
	$(Q)$(BUILD)/tests/embed-c++
	$(Q)$(BUILD)/tests/kernels-c
	$(Q)$(BUILD)/tests/kernels-c++
	$(Q)./tests/api/check-symbols $(BUILD)

asan: setup
	@$(MAKE) --no-print-directory -j$$(nproc) BUILD=build/asan NVCC= CFLAGS='-O1 -g -fno-omit-frame-pointer' \
	    SANITIZE='-fsanitize=address,undefined -fno-sanitize-recover=undefined' all \
	    $(SUITES:%=build/asan/tests/%)
	@$(MAKE) --no-print-directory BUILD=build/asan NVCC= CFLAGS='-O1 -g -fno-omit-frame-pointer' \
	    SANITIZE='-fsanitize=address,undefined -fno-sanitize-recover=undefined' unit-test

# The module for PyTorch against references in PyTorch, on the CPU, and on a GPU where there is one.
PYTHON ?= python3
test-torch: $(BUILD)/libmlora_kernels.so
	@$(PYTHON) -c 'import torch' 2>/dev/null || { echo "mlora: test-torch needs PyTorch, which $(PYTHON) does not have: name one that does with PYTHON=" >&2; exit 2; }
	cd tools/torch && MLORA_KERNELS_LIBRARY=$(abspath $(BUILD))/libmlora_kernels.so $(PYTHON) -m unittest

# The same kernel and engine tests on a GPU; fails without one.
test-cuda: all $(BUILD)/tests/kernels $(BUILD)/tests/engine
	@MLORA_BACKEND=cuda ./tests/run -j1 -- $^

# Registers, shared memory and spills of every kernel; fails where one spills.
cuda-report:
	@mkdir -p $(BUILD)/obj
	@for file in $(CUDA_CU); do \
	    $(NVCC) $(NVCC_FLAGS) -Xptxas -v -c $$file -o $(BUILD)/obj/report.o 2>&1; done | \
	    c++filt -p | ./tools/cuda-report

$(BUILD)/tests/tools: | $(BUILD)/mlora

# Ops in shared objects: those that tests load, and the examples in C. plain.c is one of each kind.
PLAIN_OPS := silu_mul add_rms_norm matmul rope lora_shrink lora_expand
OPS := $(patsubst tests/ops/%.c,%,$(filter-out %/plain.c,$(wildcard tests/ops/*.c))) \
       $(PLAIN_OPS:%=plain_%) $(patsubst tools/examples/custom_op/%.c,%,$(wildcard tools/examples/custom_op/*.c))
OPS_SO := $(OPS:%=$(BUILD)/tests/ops/%.so)
OP_CC = $(CC) -std=c99 -D_DEFAULT_SOURCE -O2 -Wall -Wextra -Wpedantic -I. -fPIC -shared
$(BUILD)/obj/tests/%.o: FLAGS += -DMLORA_TEST_OPS='"$(BUILD)/tests/ops"'
$(BUILD)/tests/kernels $(BUILD)/tests/engine $(BUILD)/tests/tools: | $(OPS_SO)

$(BUILD)/tests/ops/plain_%.so: tests/ops/plain.c kernels/mlora_op.h
	@mkdir -p $(@D)
	$(Q)$(OP_CC) -DOP=$* -o $@ $< -lm
$(BUILD)/tests/ops/%.so: tests/ops/%.c kernels/mlora_op.h
	@mkdir -p $(@D)
	$(Q)$(OP_CC) -o $@ $< -lm
$(BUILD)/tests/ops/%.so: tools/examples/custom_op/%.c kernels/mlora_op.h
	@mkdir -p $(@D)
	$(Q)$(OP_CC) -o $@ $< -lm

define SUITE
$(BUILD)/tests/$(1): $(patsubst %.c,$(BUILD)/obj/%.o,$(wildcard tests/$(1)/*.c)) $(SUPPORT_O) $(LIB_O)
	@mkdir -p $$(@D)
	@echo "ld   $$@"
	$(Q)$(CC) $(SANITIZE) -o $$@ $$^ -lcriterion $(LIBS)
endef
$(foreach suite,$(SUITES),$(eval $(call SUITE,$(suite))))

# One program per parser of untrusted bytes, for clang's libFuzzer: build/fuzz/fuzz_<parser> DIR
FUZZ := $(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
fuzz: $(FUZZ:%=$(BUILD)/fuzz/%)
$(BUILD)/fuzz/%: tests/fuzz/%.c $(LIB_C)
	@mkdir -p $(@D)
	clang $(filter-out -fPIC,$(FLAGS)) -DMLORA_VERSION='"$(VERSION)"' -O1 -fsanitize=fuzzer,address,undefined -o $@ $< \
	    $(filter-out kernels/cuda/none.c,$(LIB_C)) kernels/cuda/none.c -ljansson -lpcre2-8 -lutf8proc -lm

# Every counter of the first NCU_COUNT launches of each kernel that matters, some seconds each:
# build/ncu/<kernel>.ncu-rep, and its table as text.
NCU := $(firstword $(shell command -v ncu 2>/dev/null) $(wildcard /usr/local/cuda/bin/ncu /opt/nvidia/nsight-compute/*/ncu))
NCU_KERNELS := lora attention metadata
NCU_COUNT := 8
.PHONY: profile-ncu
profile-ncu: all
	@[ -n "$(NCU)" ] || { echo "mlora: profile-ncu needs ncu (Nsight Compute, part of the CUDA toolkit), which is not installed" >&2; exit 2; }
	@mkdir -p $(BUILD)/ncu
	@for kernel in $(NCU_KERNELS); do \
	    case $$kernel in \
	    lora) bench="kernels --only lora --batch-size 64 --num-adapters 7" ;; \
	    attention) bench="kernels --only base --batch-size 64" ;; \
	    metadata) bench="metadata --batch-size 64" ;; \
	    esac; \
	    rm -f $(BUILD)/ncu/$$kernel.ncu-rep; \
	    "$(NCU)" --set full --clock-control none --graph-profiling node -f -o $(BUILD)/ncu/$$kernel \
	        -k regex:$$kernel -c $(NCU_COUNT) --kill yes $(BUILD)/mlora bench $$bench --backend cuda \
	        --config llama-3.1-8b --load-format dummy; \
	    "$(NCU)" -i $(BUILD)/ncu/$$kernel.ncu-rep --page details > $(BUILD)/ncu/$$kernel.txt || exit 1; \
	done
	@ls -l $(BUILD)/ncu

# ---- care -----------------------------------------------------------------------------------

C_FILES := $(shell find engine kernels model tokenizer lora tools tests -name '*.[ch]' -o -name '*.cu' -o -name '*.cuh')

format:
	clang-format -i $(C_FILES)

check: setup
	@clang-format --dry-run --Werror $(C_FILES)
	./tools/check-includes
	cppcheck --quiet --std=c11 --error-exitcode=1 --inline-suppr -I. -D__linux__ \
	    --enable=warning,performance,portability --suppress=missingIncludeSystem \
	    engine kernels/*.c kernels/abi kernels/cpu model tokenizer lora tools

install: all
	install -D -m 755 $(BUILD)/mlora $(DESTDIR)$(PREFIX)/bin/mlora
	install -D -m 644 engine/mlora.h $(DESTDIR)$(PREFIX)/include/mlora.h
	install -D -m 644 kernels/mlora_op.h $(DESTDIR)$(PREFIX)/include/mlora_op.h
	install -D -m 644 $(BUILD)/libmlora.a $(DESTDIR)$(PREFIX)/lib/libmlora.a
	install -D -m 755 $(BUILD)/libmlora.so.0 $(DESTDIR)$(PREFIX)/lib/libmlora.so.0
	ln -sf libmlora.so.0 $(DESTDIR)$(PREFIX)/lib/libmlora.so
	install -D -m 644 kernels/mlora_kernels.h $(DESTDIR)$(PREFIX)/include/mlora_kernels.h
	install -D -m 755 $(BUILD)/libmlora_kernels.so.1 $(DESTDIR)$(PREFIX)/lib/libmlora_kernels.so.1
	ln -sf libmlora_kernels.so.1 $(DESTDIR)$(PREFIX)/lib/libmlora_kernels.so
	@for shape in $(notdir $(wildcard tools/shapes/*)); do \
	    install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/mlora/shapes/$$shape tools/shapes/$$shape/*; done
	@mkdir -p $(DESTDIR)$(PREFIX)/lib/pkgconfig
	@printf '%s\n' 'Name: mlora' 'Description: multi-LoRA Llama inference engine' \
	    'Version: $(VERSION)' 'Cflags: -I$(PREFIX)/include' 'Libs: -L$(PREFIX)/lib -lmlora' \
	    'Libs.private: $(LIBS)' > $(DESTDIR)$(PREFIX)/lib/pkgconfig/mlora.pc
	@printf '%s\n' 'Name: mlora_kernels' 'Description: kernels for many LoRA adapters in one batch' \
	    'Version: $(VERSION)' 'Cflags: -I$(PREFIX)/include' 'Libs: -L$(PREFIX)/lib -lmlora_kernels' \
	    > $(DESTDIR)$(PREFIX)/lib/pkgconfig/mlora_kernels.pc

clean:
	rm -rf build

-include $(shell find $(BUILD)/obj -name '*.d' 2>/dev/null)
