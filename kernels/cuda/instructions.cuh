/* Instructions that C++ has no name for: copies to shared memory, small matrix products, waiting for other
 * kernels and for the blocks of a cluster. A part of cuda.cuh, which includes it. */
#ifndef MLORA_KERNELS_CUDA_INSTRUCTIONS_CUH
#define MLORA_KERNELS_CUDA_INSTRUCTIONS_CUH

#include "kernels/cuda/cuda.cuh"

/* Where `memory` lies in shared memory, as the instructions below count it: in bytes. */
static inline __device__ uint32_t shared_address(const void *memory)
{
    return (uint32_t)__cvta_generic_to_shared(memory);
}

/* 16 bytes from global to shared memory without a register; zeros where `valid` is false. */
static inline __device__ void copy_async(uint32_t to, const void *global, bool valid)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

/* What a step reads once, weights and the cache above all, is the first to leave L2 again, so that what
 * kernels write for each other stays there and never has to go to memory. */
static inline __device__ uint64_t once_policy()
{
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    return policy;
}

/* copy_async() of what is read once. */
static inline __device__ void copy_async_once(uint32_t to, const void *global, bool valid)
{
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
                 "l"(global), "r"(valid ? 16 : 0), "l"(once_policy())
                 : "memory");
}

static inline __device__ void copy_commit()
{
    asm volatile("cp.async.commit_group;" ::: "memory");
}

/* Bring `bytes` (a multiple of 16) to the L2 cache, which all multiprocessors share: whatever is
 * written to them meanwhile is seen there. Before Hopper: nothing. */
static inline __device__ void prefetch_bulk(const void *global, uint32_t bytes)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
}

/* Wait until at most N of this thread's latest groups are under way. */
template <int N> static inline __device__ void copy_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

/* Four 8x8 matrices of 2-byte numbers; lane l gives the address of row l % 8 of matrix l / 8 and
 * gets, of each matrix, elements 2 (l % 4) and the next of row l / 4. */
static inline __device__ void load_matrices(uint32_t to[4], uint32_t row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

/* The same, each matrix transposed. */
static inline __device__ void load_matrices_transposed(uint32_t to[4], uint32_t row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

/* An 8x8 matrix held as load_matrices leaves it, transposed. */
static inline __device__ uint32_t transpose_matrix(uint32_t from)
{
    uint32_t to;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(from));
    return to;
}

/* c [16, 8] += a [16, 16] b [16, 8]. With g = lane / 4 and i = 2 (lane % 4), a lane holds
 *   a[0]: (g, i), a[1]: (g + 8, i), a[2]: (g, i + 8), a[3]: (g + 8, i + 8), each with the next k
 *   b0: (i, g), b1: (i + 8, g), each with the next k
 *   c[0], c[1]: (g, i), (g, i + 1)   c[2], c[3]: (g + 8, i), (g + 8, i + 1) */
static inline __device__ void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* The same of half the length: a [16, 8] b [8, 8], a[0] and a[1] as there. */
static inline __device__ void mma_bf16_eight(float c[4], const uint32_t a[2], uint32_t b)
{
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
}

/* Let the next kernel begin, as far as it can before its own grid_wait(). */
static inline __device__ void grid_release()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Wait until the kernels before this one have ended and what they wrote can be read. Every kernel
 * calls it in every block, so that its own end means that those before it have ended too. */
static inline __device__ void grid_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* The first statement of a kernel that has nothing to do before the wait. */
static inline __device__ void grid_begin()
{
    grid_release();
    grid_wait();
}

/* What other blocks have stored there by now. */
static inline __device__ uint2 load_now(const void *from)
{
    uint2 bits;
    asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];"
                 : "=r"(bits.x), "=r"(bits.y)
                 : "l"(from)
                 : "memory");
    return bits;
}

/* A barrier for all threads of the cluster's blocks: what one wrote before, the others see after.
 * Before Hopper a cluster is one block. The threads of a warp arrive together. */
static inline __device__ void cluster_sync()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
#else
    __syncthreads();
#endif
}

/* Its two halves: a block may write to another's memory once it knows that it has begun. */
static inline __device__ void cluster_arrive()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

static inline __device__ void cluster_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

/* The same place in the shared memory of block `rank` of the cluster. */
template <typename T> static inline __device__ T *cluster_block(T *memory, int rank)
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    T *there;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(memory), "r"(rank));
    return there;
#else
    return memory;
#endif
}

/* Count this block in at counter; true in all threads of the last of n blocks, which then sees
 * what the others wrote before. The counter is zero again after that. All threads call it. */
static inline __device__ bool arrives_last(int *counter, int n)
{
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(counter, 1) == n - 1;
        if (last) *counter = 0;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
}

#endif
