/* Pages of the cache in shared memory, for attention_decode.cu: each warp copies those that are its own, as
 * many ahead as there is room for. */
#ifndef MLORA_KERNELS_CUDA_ATTENTION_PAGES_CUH
#define MLORA_KERNELS_CUDA_ATTENTION_PAGES_CUH

#include "kernels/cuda/attention.cuh"
#include "kernels/cuda/wgmma.cuh"

/* Rows of shared memory are 16 bytes longer than a head: an odd number of 16-byte units, so that
 * eight rows' units lie in different banks. */
static constexpr __host__ __device__ int pitch(int d)
{
    return d + 8;
}

/* Copies of 16 keys or values that a warp has room for: shorter ones, more. */
static constexpr __host__ __device__ int queue(int d)
{
    return d <= 80 ? 5 : 3;
}

/* How a warp's pages come to shared memory: in 16-byte units, to rows of pitch() elements... */
struct page_rows {
    enum { ARE_BOXES = 0 };
    bf16 *k, *v;
};

/* ... or by the copy engine, to panels as in wgmma.cuh. */
struct page_boxes {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
    enum { ARE_BOXES = 0 }; /* there is none: never launched */
#else
    enum { ARE_BOXES = 1 };
#endif
    bf16 *k, *v;
    CUtensorMap keys, values; /* [. G KV_BLOCK, D] in boxes of [KV_BLOCK, PANEL] */
};

/* Bytes of 16 keys or values in shared memory. */
template <int D, typename Pages> static constexpr __host__ __device__ int unit_bytes()
{
    return KV_BLOCK * (Pages::ARE_BOXES ? D : pitch(D)) * 2;
}

/* The pages of the cache that one warp reads, keys and values in turn, copied queue() - 1 ahead. */
template <int D, typename Pages> struct page_reader {
    enum { QUEUE = queue(D), UNIT = unit_bytes<D, Pages>() };
    const int32_t *table; /* of the row */
    int G, g;
    uint32_t copies;    /* [QUEUE, UNIT] in shared memory */
    uint32_t barriers;  /* [QUEUE] of boxes: of their arrival */
    int first, step, n; /* pages first, first + step, ...: n of them */
    int end;            /* positions from here on are zeros */
    int ids;            /* in lane l: table entry of page base + l, of this warp's */

    __device__ void look_up(int i)
    {
        const int lane = threadIdx.x % WARP;
        ids = i + lane < n ? table[first + (i + lane) * step] : 0;
    }

    /* The first row, of the cache's, of page i of those looked up. */
    __device__ int row_of(int i) const
    {
        return (__shfl_sync(~0u, ids, i % WARP) * G + g) * KV_BLOCK;
    }

    __device__ void make_barriers() const
    {
        if (threadIdx.x % WARP == 0) {
            for (int i = 0; i < QUEUE; i++) barrier_make(barriers + i * 8, 1);
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        }
        __syncwarp();
    }

    /* Bring page i, one of the first, as near as it can be while others may still write to it. */
    __device__ void prefetch(const Pages &pages, int i) const
    {
        const size_t at = (size_t)row_of(i) * D;
        if (threadIdx.x % WARP > 0) return;
        prefetch_bulk(pages.k + at, KV_BLOCK * D * 2);
        prefetch_bulk(pages.v + at, KV_BLOCK * D * 2);
    }

    /* Begin to copy half `unit`: of this warp's page unit / 2, the keys or the values. */
    __device__ void start(const Pages &pages, int unit)
    {
        const int i = unit / 2, lane = threadIdx.x % WARP;
        if (i < n) {
            if (unit % 2 == 0 && i > 0 && i % WARP == 0) look_up(i);
            const int row = row_of(i);
            const uint32_t to = copies + unit % QUEUE * UNIT;
            if constexpr (Pages::ARE_BOXES) {
                const uint32_t barrier = barriers + unit % QUEUE * 8;
                if (lane == 0) {
                    barrier_expect(barrier, UNIT);
#pragma unroll
                    for (int c = 0; c < D / PANEL; c++)
                        copy_box_once(to + c * (KV_BLOCK * PANEL_ROW),
                                      unit % 2 ? &pages.values : &pages.keys, row, c * PANEL,
                                      barrier);
                }
            } else {
                const bf16 *from = (unit % 2 ? pages.v : pages.k) + (size_t)row * D;
                const int left = end - (first + i * step) * KV_BLOCK;
#pragma unroll
                for (int j = 0; j < D / 16; j++) {
                    const int part = j * WARP + lane, r = part / (D / 8);
                    copy_async_once(to + (r * pitch(D) + part % (D / 8) * 8) * 2, from + part * 8,
                                    r < left);
                }
            }
        }
        if constexpr (!Pages::ARE_BOXES) copy_commit();
    }

    /* Wait for it. The copy engine brings whatever is past the row's end, and NaN times a weight of zero
     * is NaN: values are made zeros there. */
    __device__ void wait(int unit) const
    {
        if constexpr (Pages::ARE_BOXES) {
            barrier_wait(barriers + unit % QUEUE * 8, unit / QUEUE);
            const int left = end - (first + unit / 2 * step) * KV_BLOCK;
            if (unit % 2 == 0 || left >= KV_BLOCK) return;
            for (int i = left * (D / 8) + threadIdx.x % WARP; i < KV_BLOCK * (D / 8); i += WARP)
                store_shared(at(unit, i / (D / 8), i % (D / 8)), make_uint4(0, 0, 0, 0));
            __syncwarp();
        } else {
            copy_wait<QUEUE - 2>();
            __syncwarp();
        }
    }

    /* Let a row of it be what is in shared memory at `from`. */
    __device__ void put(int unit, int row, const bf16 *from) const
    {
        static_assert(D / GROUP <= WARP);
        const int lane = threadIdx.x % WARP;
        if (lane < D / GROUP)
            store_shared(at(unit, row, lane), *(const uint4 *)(from + lane * GROUP));
        __syncwarp();
    }

    /* Where 16-byte unit `column` of a row of it lies. */
    __device__ uint32_t at(int unit, int row, int column) const
    {
        const uint32_t to = copies + unit % QUEUE * UNIT;
        if (!Pages::ARE_BOXES) return to + row * (pitch(D) * 2) + column * 16;
        return to + column / (PANEL / 8) * (KV_BLOCK * PANEL_ROW) +
               panel_at(row, column % (PANEL / 8));
    }
};

#endif
