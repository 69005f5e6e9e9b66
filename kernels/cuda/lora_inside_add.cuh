/* The second half of LoRA inside the streaming product: B times h, by the warps that make h, a warpgroup
 * whose rows are tokens. Those that multiply x by w find the result in shared memory. Of the ring of w
 * it takes stages that have served to bring w in ahead of x. */
#ifndef MLORA_KERNELS_CUDA_LORA_INSIDE_ADD_CUH
#define MLORA_KERNELS_CUDA_LORA_INSIDE_ADD_CUH

#include "kernels/cuda/lora_inside.cuh"

#ifdef __CUDACC__

enum { GROUP_ROWS = 64 /* of y, that a warpgroup multiplies x by */ };
enum { B_STEP = GROUP_ROWS * NARROW_ROW /* bytes */ };

static inline __device__ uint32_t kept_end(const struct ring_of_w &ring)
{
    return ring.at + ring.kept * ring.stage_bytes;
}

/* B of a group's rows, [tiles, segments, 64, 16]. */
static inline __device__ uint32_t b_of(const struct lora_inside &in,
                                       const struct inside_shared *shared, int group)
{
    return kept_end(shared->ring) + group * in.b_bytes;
}

/* Until w has left the stages that it does not keep. */
static inline __device__ void wait_for_stages(const struct inside_shared *shared)
{
    const struct ring_of_w &ring = shared->ring;
#pragma unroll 1
    for (int stage = ring.kept; stage < min_int(ring.stages, ring.n); stage++)
        barrier_wait(ring.empty + stage * 8, 0);
}

/* By a warp: whose the tokens are, and where each segment's rows of B are. What it can it asks for at
 * once. */
template <int HALVES>
static inline __device__ void find_segments(const struct lora_inside &in, int lane,
                                            struct inside_shared *shared)
{
    enum { A_LANE = INSIDE_TOKENS / WARP };
    static_assert(INSIDE_STEPS <= WARP);
    const struct lora_args &args = in.args;
    const bool is_segment = lane < args.n_segments;
    const int slot = is_segment ? args.segment_slot[lane] : -1;
    const int end = is_segment ? args.segment_start[lane + 1] : 0;
    int t[A_LANE], segment[A_LANE] = {};
#pragma unroll
    for (int i = 0; i < A_LANE; i++)
        t[i] = lane + i * WARP < args.n_tokens ? args.order[lane + i * WARP] : 0;
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        const bf16 *b = NULL;
        int R = 0;
        if (slot >= 0) {
            const struct lora_factors *f = lora_factors_of(args, slot, shared->slice + half);
            if (f->a) R = f->R, b = (const bf16 *)f->b + (size_t)shared->row * R;
        }
        if (is_segment) shared->b[half][lane] = b, shared->R[half][lane] = (short)R;
    }
#pragma unroll
    for (int i = 0; i < A_LANE; i++) shared->segment[lane + i * WARP] = -1;
    __syncwarp();
#pragma unroll 1
    for (int s = 0; s < args.n_segments; s++) {
        const int of = __shfl_sync(~0u, end, s);
#pragma unroll
        for (int i = 0; i < A_LANE; i++) segment[i] += lane + i * WARP >= of;
    }
#pragma unroll
    for (int i = 0; i < A_LANE; i++)
        if (lane + i * WARP < args.n_tokens && segment[i] < args.n_segments)
            shared->segment[t[i]] = segment[i];
    barrier_arrive(shared_address(&shared->segments_known));
}

/* Ask for all rows of B. Where they are is looked up for several segments at once: between the copies each
 * look would wait for those before it. */
template <int HALVES>
static inline __device__ void ask_for_b(const struct lora_inside &in,
                                        const struct inside_shared *shared)
{
    enum { AT_ONCE = 4 /* segments */, ROWS_APART = HALVES > 1 ? 0 : GROUP_ROWS };
    static_assert(2 * GROUP_ROWS == INSIDE_BLOCK && INSIDE_STEPS % AT_ONCE == 0);
    const int row = worker() / 2, unit = worker() % 2, n_segments = in.args.n_segments;
    uint32_t to = b_of(in, shared, 0) + narrow_at(row, unit);
#pragma unroll 1
    for (int tile = 0; tile < shared->share.tiles; tile++) {
        const int r = (shared->share.first + tile) * SIXTEEN + unit * GROUP;
#pragma unroll 1
        for (int first = 0; first < n_segments; first += AT_ONCE) {
            const bf16 *b[AT_ONCE][HALVES];
            int R[AT_ONCE][HALVES];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
                for (int half = 0; half < HALVES; half++) {
                    b[i][half] = shared->b[half][first + i];
                    R[i][half] = shared->R[half][first + i];
                }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if (first + i >= n_segments) break;
#pragma unroll
                for (int group = 0; group < 2; group++) {
                    const int half = group % HALVES, n = row + group * ROWS_APART;
                    const bool valid = r < R[i][half];
                    copy_async_once(to + group * in.b_bytes,
                                    valid ? b[i][half] + n * R[i][half] + r : in.x, valid);
                }
                to += B_STEP;
            }
        }
    }
    copy_commit();
}

enum { PATIENCE = 1 << 16 /* cycles: four times as long as it takes */ };

/* Wait for the first of what these lanes want of h: one of them looks for all, which would be in the way
 * of the weights. What it has not found after long, take_h() will not find. */
static inline __device__ void wait_for_h(const uint32_t *from, bool wants)
{
    const int leader = __ffs(__ballot_sync(~0u, wants)) - 1;
    const uint32_t start = cycles();
    if ((int)threadIdx.x % WARP == leader)
        while (load_now(from).x == NOTHING && cycles() - start < PATIENCE) __nanosleep(20);
    __syncwarp();
}

/* h [64 tokens, 16] of a tile in a slice, once it has come, as parts of bf16, each as mma_bf16() has it;
 * zeros where a token has none. False: some has not come for long. */
static inline __device__ bool take_h(uint32_t (&h)[H_PARTS][4], const struct lora_inside &in,
                                     int half, int tile, int thread,
                                     const struct inside_shared *shared)
{
    const int lane = thread % WARP, t0 = thread / WARP * SIXTEEN + lane / 4;
    const int r0 = (shared->share.first + tile) * SIXTEEN;
    const uint32_t *from =
        in.exchange->h[shared->turn] +
        (t0 * in.row_tiles + (shared->slice + half) * in.tiles_a_slice) * SIXTEEN + r0 +
        lane % 4 * 2;
    int units[2]; /* of 8 of the rank, that tokens t0 and t0 + 8 have */
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int segment = shared->segment[t0 + i * 8];
        units[i] = segment < 0 ? 0 : (shared->R[half][segment] - r0) / GROUP;
    }
    wait_for_h(units[0] > 0 ? from : from + 8 * in.row_tiles * SIXTEEN,
               units[0] > 0 || units[1] > 0);

    const uint32_t start = cycles();
    uint2 bits[4][INSIDE_PARTS];
    bool all;
    do {
        all = true;
        const uint32_t *part = from;
#pragma unroll
        for (int p = 0; p < INSIDE_PARTS; p++, part += anew(in.T * in.row_tiles * SIXTEEN)) {
            const uint32_t *second = part + anew(8 * in.row_tiles * SIXTEEN);
#pragma unroll
            for (int k = 0; k < 2; k++) {
                bits[2 * k][p] = bits[2 * k + 1][p] = make_uint2(0, 0);
                if (k < units[0]) bits[2 * k][p] = load_now(part + k * GROUP);
                if (k < units[1]) bits[2 * k + 1][p] = load_now(second + k * GROUP);
            }
        }
#pragma unroll
        for (int e = 0; e < 4; e++)
#pragma unroll
            for (int p = 0; p < INSIDE_PARTS; p++)
                all = all && bits[e][p].x != NOTHING && bits[e][p].y != NOTHING;
    } while (!all && cycles() - start < PATIENCE);
#pragma unroll
    for (int e = 0; e < 4; e++) {
        uint32_t part[H_PARTS];
        float2 sum = {};
#pragma unroll
        for (int p = 0; p < INSIDE_PARTS; p++) {
            sum.x += __uint_as_float(bits[e][p].x);
            sum.y += __uint_as_float(bits[e][p].y);
        }
        split_pair<H_PARTS>(part, sum.x, sum.y);
#pragma unroll
        for (int i = 0; i < H_PARTS; i++) h[i][e] = part[i];
    }
    return inside_all(all);
}

/* What is added to a group's rows: [64, TOKENS] f32. Of row r, token t is at t ^ turned_by(r), so that stores
 * and loads of a warp find different banks, or two of a bank. */
template <int TOKENS>
static inline __device__ float *added_to(const struct lora_inside &in,
                                         const struct inside_shared *shared, int group)
{
    return (float *)__cvta_shared_to_generic(kept_end(shared->ring) + 2 * in.b_bytes) +
           group * (GROUP_ROWS * TOKENS);
}

template <int TOKENS> static inline __device__ int turned_by(int row)
{
    return row / 2 % (TOKENS < 32 ? TOKENS / 8 : 4) * 8;
}

/* B times h of a tile of all segments, of whose h a product has that of its segment's tokens, and zeros: to
 * what is added to a group's rows, or, of the first tile, in its place. */
template <int TOKENS>
static inline __device__ void
multiply_tile(const struct lora_inside &in, const struct inside_shared *shared,
              const uint32_t (&h)[H_PARTS][4], int group, int tile, int thread)
{
    int lane = thread % WARP, t0 = thread / WARP * SIXTEEN + lane / 4;
    const int of_first = shared->segment[t0], of_second = shared->segment[t0 + 8];
    uint32_t b_at = b_of(in, shared, group) + tile * in.args.n_segments * B_STEP;
    float sum[GROUP_ROWS / 2] = {};
    uint32_t its[H_PARTS][4];
#pragma unroll 1
    for (int segment = 0; segment < in.args.n_segments; segment++, b_at += B_STEP) {
        const uint64_t b = operand_of_narrow(b_at);
#pragma unroll
        for (int i = 0; i < H_PARTS; i++) {
            products_wait<H_PARTS - 1>(); /* its[i] has been read */
#pragma unroll
            for (int e = 0; e < 4; e++)
                its[i][e] = segment == (e % 2 ? of_second : of_first) ? h[i][e] : 0;
            products_begin();
            product_rows(sum, its[i], b);
            products_commit();
        }
    }
    products_wait<0>();
    products_land(sum);
    thread = anew(thread), lane = thread % WARP, t0 = thread / WARP * SIXTEEN + lane / 4;
    if (t0 >= TOKENS) return;
    float *added = added_to<TOKENS>(in, shared, group) + lane % 4 * 2 * TOKENS;
    const int turned = turned_by<TOKENS>(lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float *of_token = added + ((t0 + i * 8) ^ turned);
#pragma unroll
        for (int j = 0; j < GROUP_ROWS / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float *to = of_token + (j * 8 + e) * TOKENS;
                *to = sum[4 * j + 2 * i + e] + (tile > 0 ? *to : 0.0f);
            }
    }
}

/* What the block adds. False: some of h has not come for long. */
template <int TOKENS, int HALVES>
static inline __device__ bool multiply_inside(const struct lora_inside &in, int thread,
                                              const struct inside_shared *shared)
{
#pragma unroll 1
    for (int i = 0; i < shared->share.tiles * HALVES; i++) {
        const int tile = i / HALVES, half = i % HALVES;
        uint32_t h[H_PARTS][4];
        if (!take_h(h, in, half, tile, anew(thread), shared)) return false;
        if (i == 0) {
            copy_wait<0>();
            shared_publish();
            inside_sync(); /* B is there */
        }
#pragma unroll 1
        for (int group = half; group < 2; group += HALVES)
            multiply_tile<TOKENS>(in, shared, h, group, tile, anew(thread));
    }
    return true;
}

/* What the fifth warp does in a block. */
template <int HALVES>
static inline __device__ void keep_inside(const struct lora_inside &in, int lane,
                                          struct inside_shared *shared)
{
    if (shared->share.tiles > 0) find_segments<HALVES>(in, lane, shared);
    keep_exchange(in, lane, shared);
}

/* What the others do. `ready` is told when what add_inside() reads is there. */
template <int TOKENS, int HALVES>
static inline __device__ void work_inside(const struct lora_inside &in, int thread,
                                          struct inside_shared *shared)
{
    int unit = first_unit(in, blockIdx.x), stride = in.n_blocks;
#pragma unroll 1
    for (;;) {
#pragma unroll 1
        while (unit < in.n_units) {
            shrink_inside(in, unit, shared,
                          shared->ring.at +
                              (stride > 1 ? shared->ring.stages * shared->ring.stage_bytes : 0));
            unit = shared->unit.number + stride;
            inside_sync(); /* that unit and its sums have been read */
        }
        if (shared->share.tiles == 0) return;
        barrier_wait(shared_address(&shared->segments_known), 0);
        wait_for_stages(shared);
        ask_for_b<HALVES>(in, shared);
        barrier_wait(shared_address(&shared->turn_known), 0);
        if (multiply_inside<TOKENS, HALVES>(in, anew(thread), shared)) break;
        /* Who is to make it may wait for a multiprocessor that others' kernels hold: make all of it,
         * in the ring, which is free then, and begin anew. */
        copy_wait<0>();
        inside_sync();
        barrier_wait(shared_address(&shared->idle), 0);
        unit = 0, stride = 1;
    }
    barrier_arrive(shared_address(&shared->ready));
}

/* sum [64, TOKENS] of a warpgroup += what has been made for its rows. */
template <int TOKENS>
static inline __device__ void add_inside(float (&sum)[TOKENS / 2], const struct lora_inside &in,
                                         const struct inside_shared *shared)
{
    const int group = threadIdx.x / 128, lane = threadIdx.x % WARP;
    const int row = threadIdx.x % 128 / WARP * SIXTEEN + lane / 4;
    const float *added = added_to<TOKENS>(in, shared, group) + row * TOKENS + lane % 4 * 2;
    const int turned = turned_by<TOKENS>(row); /* and of row + 8 */
#pragma unroll
    for (int i = 0; i < TOKENS / 4; i++) {
        const float2 two = *(const float2 *)(added + i % 2 * 8 * TOKENS + (i / 2 * 8 ^ turned));
        sum[2 * i] += two.x, sum[2 * i + 1] += two.y;
    }
}

#endif
#endif
