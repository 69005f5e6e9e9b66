/* The instructions of sm_90a that attention_prefill_sm90.cu and matmul_sm90.cu are made of: matrix
 * products of a warpgroup (four warps), whose operands lie in shared memory, copies of boxes of a
 * matrix to there, and the barriers on which their arrival is awaited.
 *
 * Shared memory holds panels of 64 columns of 2 bytes: rows of 128 bytes, in which 16-byte unit u
 * of row r is at u ^ r % 8, so that eight rows' units lie in different banks. Both the copies and
 * the products know this order. Panels begin at multiples of 1,024 bytes. */
#ifndef MLORA_KERNELS_CUDA_WGMMA_CUH
#define MLORA_KERNELS_CUDA_WGMMA_CUH

#include "kernels/cuda/cuda.cuh"

#include <cuda.h>
#include <cudaTypedefs.h>

enum { PANEL = 64, PANEL_ROW = 128 /* bytes */ };
enum { NARROW_ROW = 32 };

/* Byte of 16-byte unit `unit` of row `row` in its panel. */
static inline __device__ uint32_t panel_at(int row, int unit)
{
    return row * PANEL_ROW + (unit ^ row % 8) * 16;
}

/* The same of a narrow panel, of 16 columns: rows of 32 bytes, unit u of row r at u ^ r / 4 % 2. It begins at a
 * multiple of 256 bytes. */
static inline __device__ uint32_t narrow_at(int row, int unit)
{
    return row * NARROW_ROW + (unit ^ row / 4 % 2) * 16;
}

static inline __device__ void store_shared(uint32_t to, uint4 bits)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(bits.x), "r"(bits.y),
                 "r"(bits.z), "r"(bits.w)
                 : "memory");
}

static inline __device__ uint4 load_shared(uint32_t from)
{
    uint4 bits;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(from)
                 : "memory");
    return bits;
}

static inline __device__ uint2 load_shared_pair(uint32_t from)
{
    uint2 bits;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(bits.x), "=r"(bits.y)
                 : "r"(from)
                 : "memory");
    return bits;
}

static inline __device__ void store_shared_float(uint32_t to, float value)
{
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(value) : "memory");
}

static inline __device__ void store_shared_pair(uint32_t to, uint2 bits)
{
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(bits.x), "r"(bits.y) : "memory");
}

/* ---- barriers ----------------------------------------------------------------------------- */

/* In shared memory, 8 bytes: a phase ends when `arrivals` have arrived and all bytes that were
 * announced have come. The first phase is 0. */
static inline __device__ void barrier_make(uint32_t barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

static inline __device__ void barrier_arrive(uint32_t barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/* Arrive, and announce `bytes` of copies. */
static inline __device__ void barrier_expect(uint32_t barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

/* Wait for the end of phase `phase`, of which only the parity counts. */
static inline __device__ void barrier_wait(uint32_t barrier, int phase)
{
    asm volatile("{ .reg .pred ended;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
                 "@!ended bra again; }" ::"r"(barrier),
                 "r"(phase & 1)
                 : "memory");
}

/* Barriers of `threads` threads of the block, by number: 0 is __syncthreads(). */
static inline __device__ void threads_sync(int number, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

static inline __device__ void threads_arrive(int number, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

/* What this thread stored in shared memory, the copies and products after a barrier see. */
static inline __device__ void shared_publish()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* Registers of each thread from here on; all of a warpgroup call it. */
template <int N> static inline __device__ void registers_release()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> static inline __device__ void registers_take()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

/* ---- copies ------------------------------------------------------------------------------- */

/* The matrix [n_rows, n_columns] of bf16 in boxes of a panel's columns by `box_rows`, for copy_box();
 * what lies outside arrives as zeros. Promoted to 256 bytes in L2, attention at decode took 8 % longer. */
static inline CUtensorMap map_panels(struct cuda_device *cuda, const bf16 *matrix, int n_rows,
                                     int n_columns, int box_rows, const char *op)
{
    CUtensorMap map = {};
    const cuuint64_t size[2] = {(cuuint64_t)n_columns, (cuuint64_t)n_rows};
    const cuuint64_t stride[1] = {(cuuint64_t)n_columns * sizeof(bf16)};
    const cuuint32_t box[2] = {PANEL, (cuuint32_t)box_rows}, step[2] = {1, 1};
    const CUresult result = ((PFN_cuTensorMapEncodeTiled_v12000)cuda->encode_tensor_map)(
        &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)matrix, size, stride, box, step,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
        CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) cuda_fail(cuda, op, "no map for the copy engine");
    return map;
}

/* The keys or values of a cache, [. G KV_BLOCK, d], in boxes of a page's rows. How many rows there are
 * does not matter: the block table is right. */
static inline CUtensorMap map_cache(struct cuda_device *cuda, const bf16 *cache, int d)
{
    return map_panels(cuda, cache, INT32_MAX, d, KV_BLOCK, "attention");
}

/* All memory as a matrix [., n_columns] of bf16 that begins wherever copy_rows_once() is told, in boxes of
 * `box_rows` rows of `row_bytes`: 32, 64 or 128. What lies past n_columns arrives as zeros. The third
 * coordinate counts 16 bytes, the fourth MEMORY_LOW bits of those. False: the driver makes no such map. */
enum { MEMORY_LOW = 24, MEMORY_BITS = 49 /* of an address of the GPU */ };
static inline bool map_memory(const struct cuda_device *cuda, CUtensorMap *map, int n_columns,
                              int box_rows, int row_bytes)
{
    const cuuint64_t size[4] = {(cuuint64_t)n_columns, (cuuint64_t)box_rows, 1u << MEMORY_LOW,
                                1u << (MEMORY_BITS - MEMORY_LOW - 4)};
    const cuuint64_t stride[3] = {(cuuint64_t)n_columns * sizeof(bf16), 16, 16ull << MEMORY_LOW};
    const cuuint32_t box[4] = {(cuuint32_t)row_bytes / 2, (cuuint32_t)box_rows, 1, 1};
    const cuuint32_t step[4] = {1, 1, 1, 1};
    const CUtensorMapSwizzle order = row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                       : CU_TENSOR_MAP_SWIZZLE_32B;
    return ((PFN_cuTensorMapEncodeTiled_v12000)cuda->encode_tensor_map)(
               map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, NULL, size, stride, box, step,
               CU_TENSOR_MAP_INTERLEAVE_NONE, order, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/* Begin to copy the box of `map` at (row, column) to shared memory; it arrives at `barrier`. */
static inline __device__ void copy_box(uint32_t to, const CUtensorMap *map, int row, int column,
                                       uint32_t barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %2}], [%4];" ::"r"(to),
                 "l"(map), "r"(row), "r"(column), "r"(barrier)
                 : "memory");
}

/* The same of what is read once. */
static inline __device__ void copy_box_once(uint32_t to, const CUtensorMap *map, int row,
                                            int column, uint32_t barrier)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%3, %2}], [%4], %5;" ::"r"(to),
                 "l"(map), "r"(row), "r"(column), "r"(barrier), "l"(once_policy())
                 : "memory");
}

/* The same of a box of map_memory(): the first rows of the matrix that begins at `from`, a multiple of 16
 * bytes, from column `column` on. */
static inline __device__ void copy_rows_once(uint32_t to, const CUtensorMap *map, const bf16 *from,
                                             int column, uint32_t barrier)
{
    const uint64_t unit = (uint64_t)from >> 4;
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
                 "l"(map), "r"(column), "r"(0), "r"((int)(unit & ((1u << MEMORY_LOW) - 1))),
                 "r"((int)(unit >> MEMORY_LOW)), "r"(barrier), "l"(once_policy())
                 : "memory");
}

/* Begin to read a map itself, which lies in memory. */
static inline __device__ void prefetch_map(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/* Begin to copy `bytes`, a multiple of 16, that follow each other. */
static inline __device__ void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

/* ---- products ----------------------------------------------------------------------------- */

/* An operand: rows of panels from `at` on, an eight of rows every 1,024 bytes, the next panel
 * `panel_bytes` further (where the operand has more than one). */
static inline __device__ uint64_t operand(uint32_t at, int panel_bytes)
{
    return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)(panel_bytes >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

/* The same of a panel whose rows have `row_bytes`: 32, 64 or 128. */
static inline __device__ uint64_t operand_of_rows(uint32_t at, int row_bytes)
{
    const int order = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
    return (uint64_t)(at >> 4 & 0x3fff) | (uint64_t)1 << 16 | (uint64_t)(row_bytes / 2) << 32 |
           (uint64_t)order << 62;
}

/* Registers that products read or write belong to them from products_begin() until products_wait()
 * has returned for their group. */
static inline __device__ void products_begin()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

static inline __device__ void products_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/* Wait until at most N groups are under way. */
template <int N> static inline __device__ void products_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

/* Keep the compiler from using c before this point. */
template <int N> static inline __device__ void products_land(float (&c)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");
}

/* In all of them, of c [64, N], warp w of the warpgroup and lane l hold, in the order of
 * mma_bf16() with eight columns after eight, rows 16 w + l / 4 and 8 below. */

/* c [64, 128] (+)= A B^T, 16 columns of A [64, .] and B [128, .]; `add`: or else c is replaced. */
static inline __device__ void product_rows(float (&c)[64], uint64_t a, uint64_t b, int add)
{
    asm volatile("{ .reg .pred add;\n"
                 "setp.ne.b32 add, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "%64, %65, add, 1, 1, 0, 0; }"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                   "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),
                   "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]),
                   "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
                   "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]),
                   "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]),
                   "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]),
                   "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
                   "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]),
                   "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]),
                   "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
                 : "l"(a), "l"(b), "r"(add));
}

/* c [64, 16] += A B^T, 16 columns of A [64, .] and B [16, .]. */
static inline __device__ void product_rows(float (&c)[8], uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7}, %8, %9, 1, 1, 1, 0, 0;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                   "+f"(c[6]), "+f"(c[7])
                 : "l"(a), "l"(b));
}

/* c [64, 64] += A B^T, 16 columns of A and B [64, .]. */
static inline __device__ void product_rows(float (&c)[32], uint64_t a, uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, 1, 1, 1, 0, 0;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                   "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),
                   "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]),
                   "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
                   "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]),
                   "+f"(c[30]), "+f"(c[31])
                 : "l"(a), "l"(b));
}

/* c [64, 128] += a B, 16 rows of B [., 128]; a [64, 16] as mma_bf16() has it. */
static inline __device__ void product_columns(float (&c)[64], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                   "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),
                   "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]),
                   "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
                   "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]),
                   "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]),
                   "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]),
                   "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
                   "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]),
                   "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]),
                   "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* c [64, 64] += a B, 16 rows of B [., 64]. */
static inline __device__ void product_columns(float (&c)[32], const uint32_t (&a)[4], uint64_t b)
{
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]),
                   "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]),
                   "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]),
                   "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
                   "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]),
                   "+f"(c[30]), "+f"(c[31])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#endif
