/* Few tokens times many weights on sm_90a: bound by one read of w. In each block a warp brings rows of
 * w through shared memory with the copy engine, as far ahead as there is room for, and warpgroups
 * multiply them as they come. It begins while the kernels before it still run, since w depends on none
 * of them, so that the memory does not rest between two products.
 *
 * Where there are fewer tiles of rows than multiprocessors, blocks share out a tile's k, and the op
 * that reads y adds up what they have summed: a cluster of blocks that did so here could begin only
 * when the kernel before has left that many multiprocessors. How a row is summed depends on N and K
 * alone, not on the tokens beside it. */
#include "kernels/cuda/lora_inside_add.cuh"
#include "kernels/cuda/wgmma.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum {
    ROWS = 128, /* of w, a block: a warpgroup has 64 */
    CONSUMERS = ROWS / 64 * 128,
    STREAM_BLOCK = CONSUMERS + 2 * WARP,
    STREAM_REGISTERS = 104, /* of a thread, at most */
    STREAM_TOKENS = INSIDE_TOKENS,
    FEW_TOKENS = 16,
    /* Panels of w that a block has asked for and has not got: they keep the memory busy. With more of
     * them all that others read beside it, and x, would wait longer. */
    IN_FLIGHT = 4,
    /* Panels of w in shared memory: as many as there is room for, so that the memory does not rest
     * while small kernels run. With a branch beside the product room is left for its kernels. */
    STAGES_MAX = 12,
    STAGES_BESIDE = 6,
    /* Bytes of shared memory, of 227 KB: a block of norm or rope finds room beside it, or it would begin
     * only when this one has ended. */
    SHARED_MAX = 225 * 1024,
};

/* Rings of buffers: panels of TOKENS of x, then of ROWS rows of w, then what LoRA has. */
template <int TOKENS, typename Lora, bool IS_GATE> struct ring {
    enum {
        HALVES = IS_GATE ? 2 : 1,
        W_BYTES = ROWS * PANEL_ROW,
        X_BYTES = TOKENS * PANEL_ROW,
        X_STAGES = TOKENS > FEW_TOKENS ? 4 : 7,
        BARRIERS = 2 * STAGES_MAX + 2 * X_STAGES,
        X_AT = 1024, /* bytes, in shared memory: a multiple of this; barriers are before */
        W_AT = X_AT + X_STAGES * X_BYTES,
    };
};

/* Bytes that a product may use for what adapters add, with the panels of w that it has to keep. */
static int room_of_places(int tokens)
{
    using many = ring<STREAM_TOKENS, struct lora_inside, false>;
    using few = ring<FEW_TOKENS, struct lora_inside, false>;
    return SHARED_MAX - (tokens > FEW_TOKENS ? (int)many::W_AT : (int)few::W_AT) -
           (IN_FLIGHT + 1) * many::W_BYTES;
}

/* Where the next panel lies in a ring, and how often the ring was gone through before: the first time all
 * of its stages, then those that are kept. */
struct place {
    int stage, turn;

    __device__ void advance(int stages, int kept)
    {
        if (++stage < (turn > 0 ? kept : stages)) return;
        stage = 0;
        turn++;
    }
};

/* The thread that copies w: panels [begin, begin + n) from row n0 on, the second half of the rows,
 * where that is another box, from n1 on. */
template <typename R>
static __device__ void copy_w(uint32_t stages, uint32_t w_full, uint32_t empty, int w_stages,
                              int kept, const CUtensorMap *w, int n0, int n1, int begin, int n)
{
    struct place at = {0, 0}, before = {0, 0}; /* panel i, and the one IN_FLIGHT before it */
    for (int i = 0; i < n; i++) {
        if (i >= IN_FLIGHT) {
            barrier_wait(w_full + before.stage * 8, before.turn);
            before.advance(w_stages, kept);
        }
        if (at.turn > 0) barrier_wait(empty + at.stage * 8, at.turn - 1);
        const uint32_t full = w_full + at.stage * 8, to = stages + at.stage * R::W_BYTES;
        barrier_expect(full, R::W_BYTES);
        copy_box_once(to, w, n0, (begin + i) * PANEL, full);
        if (R::HALVES > 1) copy_box_once(to + R::W_BYTES / 2, w, n1, (begin + i) * PANEL, full);
        at.advance(w_stages, kept);
    }
}

/* The thread that copies x. */
template <typename R>
static __device__ void copy_x(uint32_t stages, uint32_t x_full, uint32_t empty,
                              const CUtensorMap *x, int begin, int n, int x_bytes)
{
    grid_wait();
    for (int i = 0; i < n; i++) {
        const int s = i % R::X_STAGES;
        if (i >= R::X_STAGES) barrier_wait(empty + s * 8, i / R::X_STAGES - 1);
        barrier_expect(x_full + s * 8, x_bytes);
        copy_box(stages + s * R::X_BYTES, x, 0, (begin + i) * PANEL, x_full + s * 8);
    }
}

/* The end of a block that has 64 rows of gate and the same of up: out[t, n0 + i] = silu(gate) up, through
 * `room`, shared memory that nobody reads any more once all are here.
 *
 *   out [T, F]    bias [2 F] or NULL */
template <int TOKENS>
static __device__ void store_gated(bf16 *out, float (&sum)[TOKENS / 2], const float *bias, int T,
                                   int F, int n0, uint32_t room, unsigned char *room_memory)
{
    enum { HERE = 2, UP, GATED, ROW = 72 /* elements: rows in different banks */ };
    enum { UP_BYTES = TOKENS / 8 * 128 * 16 };
    const int thread = threadIdx.x % 128, lane = threadIdx.x % WARP;
    const int row = thread / WARP * 16 + lane / 4; /* and 8 below */
    const bool is_up = threadIdx.x >= 128;
    bf16 *gated = (bf16 *)(room_memory + UP_BYTES); /* [TOKENS, ROW] */

#pragma unroll
    for (int half = 0; half < 2; half++) {
        const float b = bias ? bias[(is_up ? F : 0) + n0 + row + half * 8] : 0.0f;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) sum[4 * j + 2 * half + e] += b;
    }
    threads_sync(HERE, CONSUMERS);
    if (is_up) {
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++)
            store_shared(room + (j * 128 + thread) * 16,
                         make_uint4(__float_as_uint(sum[4 * j]), __float_as_uint(sum[4 * j + 1]),
                                    __float_as_uint(sum[4 * j + 2]),
                                    __float_as_uint(sum[4 * j + 3])));
        threads_arrive(UP, CONSUMERS);
        return;
    }
    threads_sync(UP, CONSUMERS);
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
        const uint4 bits = load_shared(room + (j * 128 + thread) * 16);
        const float up[4] = {__uint_as_float(bits.x), __uint_as_float(bits.y),
                             __uint_as_float(bits.z), __uint_as_float(bits.w)};
#pragma unroll
        for (int e = 0; e < 4; e++)
            gated[(j * 8 + lane % 4 * 2 + e % 2) * ROW + row + e / 2 * 8] =
                __float2bfloat16_rn(silu<bf16>(sum[4 * j + e]) * up[e]);
    }
    threads_sync(GATED, 128);
    grid_wait(); /* out may have been read until now */
    for (int i = thread; i < T * 8; i += 128)
        *(uint4 *)(out + (size_t)(i / 8) * F + n0 + i % 8 * GROUP) =
            *(const uint4 *)(gated + i / 8 * ROW + i % 8 * GROUP);
}

/* y[t, n] = dot(w[n, :], x[t, :]) + bias[n] over the first share of k, parts[p, t, n] the same without
 * a bias over share p + 1, for t < T <= TOKENS; of a gate, which has one share, silu_mul of that
 *
 *   result: y [T, N], or [T, N / 2] bf16    parts [shares - 1, T, N]    bias [N] or NULL
 *   x [T, K], w [N, K]: maps with boxes of x_bytes / PANEL_ROW and ROWS / HALVES rows    n_panels of k
 *   grid tiles of N / ROWS times shares, and what more blocks `lora` gets
 *   block STREAM_BLOCK + Lora::THREADS
 *   shared ring<...>::W_AT, `stages` panels of w, fewer where a block makes parts of h, and what
 *          lora_inside needs behind those that are kept
 * With LoRA it takes as many registers as leave room for small kernels beside it. */
template <int TOKENS, typename Lora, bool IS_GATE>
static __global__ void __maxnreg__(Lora::THREADS > 0 ? LORA_REGISTERS : STREAM_REGISTERS)
    matmul_stream_kernel(void *result, float *parts, const __grid_constant__ CUtensorMap x,
                         const __grid_constant__ CUtensorMap w, const float *__restrict__ bias,
                         int T, int N, int n_panels, int x_bytes, int tiles, int shares, int stages,
                         int stages_of_makers, const __grid_constant__ Lora lora)
{
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using R = ring<TOKENS, Lora, IS_GATE>;
    /* Those that multiply, be it for LoRA, in fours of warps, then the two that copy, then LoRA's keeper. */
    constexpr int COPIERS = CONSUMERS + Lora::WORKERS, KEEPER = COPIERS + 2 * WARP;
    int w_stages = stages, kept = stages;
    if constexpr (Lora::THREADS > 0) {
        const bool makes = makes_h(lora);
        w_stages = makes ? stages_of_makers : stages;
        kept = makes ? lora.kept_of_makers : lora.kept;
    }
    extern __shared__ __align__(1024) unsigned char memory[];
    uint64_t *barriers = (uint64_t *)memory;
    struct inside_shared &shared = *(struct inside_shared *)(barriers + R::BARRIERS);
    static_assert(R::BARRIERS * sizeof *barriers + sizeof shared <= R::X_AT);
    const uint32_t x_ring = shared_address(memory) + R::X_AT;
    const uint32_t w_ring = shared_address(memory) + R::W_AT;
    const uint32_t w_full = shared_address(barriers), w_empty = w_full + STAGES_MAX * 8;
    const uint32_t x_full = w_empty + STAGES_MAX * 8, x_empty = x_full + R::X_STAGES * 8;
    const int n0 = blockIdx.x % tiles * (ROWS / R::HALVES), share = blockIdx.x / tiles;
    const int begin = n_panels * share / shares, n = n_panels * (share + 1) / shares - begin;

    if (threadIdx.x == 0) {
        for (int s = 0; s < w_stages; s++) {
            barrier_make(w_full + s * 8, 1);
            barrier_make(w_empty + s * 8, CONSUMERS / 128);
        }
        for (int s = 0; s < R::X_STAGES; s++) {
            barrier_make(x_full + s * 8, 1);
            barrier_make(x_empty + s * 8, CONSUMERS / 128);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if constexpr (Lora::THREADS > 0)
        if (threadIdx.x == KEEPER)
            inside_make(lora, &shared, n0, share, {w_ring, w_empty, w_stages, kept, R::W_BYTES, n},
                        CONSUMERS / 128);
    __syncthreads();
    if constexpr (Lora::THREADS > 0) {
        if (threadIdx.x >= KEEPER) {
            keep_inside<R::HALVES>(lora, threadIdx.x - KEEPER, &shared);
            return;
        }
        if (threadIdx.x >= CONSUMERS && threadIdx.x < COPIERS) {
            work_inside<TOKENS, R::HALVES>(lora, &shared);
            return;
        }
        if (share >= shares) {
            if (threadIdx.x == 0) grid_release();
            return;
        }
    }
    if (threadIdx.x >= COPIERS) {
        if (threadIdx.x == COPIERS)
            copy_w<R>(w_ring, w_full, w_empty, w_stages, kept, &w, n0, N / 2 + n0, begin, n);
        if (threadIdx.x == COPIERS + WARP)
            copy_x<R>(x_ring, x_full, x_empty, &x, begin, n, x_bytes);
        return;
    }

    float sum[TOKENS / 2] = {};
    struct place at = {0, 0};
#pragma unroll 1
    for (int i = 0; i < n; i++) {
        const int ws = at.stage, xs = i % R::X_STAGES;
        const uint32_t w_panel = w_ring + ws * R::W_BYTES + threadIdx.x / 128 * (64 * PANEL_ROW);
        const uint32_t x_panel = x_ring + xs * R::X_BYTES;
        barrier_wait(w_full + ws * 8, at.turn);
        barrier_wait(x_full + xs * 8, i / R::X_STAGES);
        if (i == 0) grid_release(); /* not before x: what is launched sooner holds that up */
        products_begin();
#pragma unroll
        for (int k = 0; k < PANEL / 16; k++)
            product_rows(sum, operand(w_panel + k * 32, 16), operand(x_panel + k * 32, 16));
        products_commit();
        products_wait<0>();
        if (threadIdx.x % 128 == 0) {
            barrier_arrive(w_empty + ws * 8);
            barrier_arrive(x_empty + xs * 8);
        }
        at.advance(w_stages, kept);
    }
    products_land(sum);
    if constexpr (Lora::THREADS > 0)
        if (shared.share.tiles > 0) {
            if (threadIdx.x % 128 == 0) barrier_arrive(shared_address(&shared.idle));
            barrier_wait(shared_address(&shared.ready), 0);
            add_inside<TOKENS, R::HALVES>(sum, lora, &shared);
        }
    if constexpr (IS_GATE) {
        store_gated<TOKENS>((bf16 *)result, sum, bias, T, N / 2, n0, x_ring, memory + R::X_AT);
        return;
    }
    float *y = (float *)result;
    grid_wait(); /* y and parts may have been read until now */

    const int lane = threadIdx.x % WARP, row = n0 + threadIdx.x / WARP * 16 + lane / 4;
    if (share > 0) y = parts + (size_t)(share - 1) * T * N;
    if (share > 0) bias = NULL;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int r = row + half * 8;
        if (r >= N) continue;
        const float b = bias ? bias[r] : 0.0f;
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int t = j * 8 + lane % 4 * 2 + e;
                if (t < T) y[(size_t)t * N + r] = sum[4 * j + 2 * half + e] + b;
            }
    }
#endif
}

/* ---- launchers ---------------------------------------------------------------------------- */

/* Blocks for each tile of rows: as many, of those that a sum may have, as find a multiprocessor. */
static int shares_of(const struct cuda_device *cuda, int tiles, int n_panels)
{
    enum { PANELS_MIN = 4 }; /* of a block */
    int shares = 1;
    while (2 * shares <= PRODUCT_PARTS + 1 && 2 * shares * tiles <= cuda->n_sms &&
           n_panels >= 2 * shares * PANELS_MIN)
        shares *= 2;
    return shares;
}

/* A product, as a launch needs to know it. */
struct streamed {
    void *y;
    float *parts;
    const bf16 *x;
    struct matrix w;
    const float *bias;
    int T, tiles, shares;
    int stages; /* of w, at most */
    bool has_lora;
    struct lora_inside lora;
};

/* Blocks that have rows of y. */
static int own_blocks(const struct streamed *s)
{
    return s->tiles * s->shares;
}

/* Of `room` bytes of shared memory: h, what is added, and so many places of so many segments of B as there is
 * room for, which are two segments at least, so that one comes while the other is read. What they all take;
 * 0: there is too little room. */
static int plan_places(struct lora_inside *lora, int room, int halves)
{
    const int a_segment = 2 / halves * GROUP_ROWS * lora->row_bytes;
    const int others = h_bytes(lora) + 2 * lora->added_bytes;
    const int at_once = min_int((room - others) / a_segment, lora->args.n_segments * halves);

    if (at_once < min_int(2, lora->args.n_segments * halves)) return 0;
    lora->segments_a_place = ceil_div(at_once, INSIDE_PLACES);
    lora->n_places = at_once / lora->segments_a_place;
    return lora->n_places * lora->segments_a_place * a_segment + others;
}

template <int TOKENS, typename Lora, bool IS_GATE>
static void launch_kernel(struct cuda_device *cuda, const struct streamed *s, const Lora &lora)
{
    using R = ring<TOKENS, Lora, IS_GATE>;
    const bool has_lora = Lora::THREADS > 0;
    const int K = s->w.K, N = s->w.N, x_rows = ceil_div(s->T, 8) * 8;
    const int blocks = max_int(own_blocks(s), has_lora ? s->lora.n_blocks : 0);
    const CUtensorMap x_map = map_panels(cuda, s->x, s->T, K, x_rows, "matmul");
    const CUtensorMap w_map =
        map_panels(cuda, (const bf16 *)s->w.data, N, K, ROWS / R::HALVES, "matmul");
    const auto kernel = matmul_stream_kernel<TOKENS, Lora, IS_GATE>;
    const int room = SHARED_MAX - R::W_AT;
    const int stages = min_int(s->stages, room / R::W_BYTES);
    const int stages_of_makers = min_int(s->stages, (room - 2 * INSIDE_STAGED) / R::W_BYTES);
    int shared = stages * R::W_BYTES;
    Lora with = lora;

    assert(stages <= STAGES_MAX);
    if constexpr (Lora::THREADS > 0) {
        const int used = plan_places(&with, room_of_places(TOKENS), R::HALVES);
        with.kept = min_int(stages, (room - used) / R::W_BYTES);
        with.kept_of_makers = min_int(stages_of_makers, with.kept);
        assert(with.kept_of_makers > IN_FLIGHT);
        shared = max_int(shared, with.kept * R::W_BYTES + used);
        shared = max_int(shared, stages_of_makers * R::W_BYTES + 2 * INSIDE_STAGED);
    }
    cuda_allow_shared(cuda, kernel, SHARED_MAX, "matmul");
    cuda_launch(cuda, "matmul", kernel, blocks, STREAM_BLOCK + Lora::THREADS, R::W_AT + shared, 1,
                s->y, s->parts, x_map, w_map, s->bias, s->T, N, ceil_div(K, PANEL),
                x_rows * PANEL_ROW, s->tiles, s->shares, stages, stages_of_makers, with);
}

template <int TOKENS, bool IS_GATE>
static void launch_tokens(struct cuda_device *cuda, const struct streamed *s)
{
    if (s->has_lora)
        launch_kernel<TOKENS, struct lora_inside, IS_GATE>(cuda, s, s->lora);
    else
        launch_kernel<TOKENS, struct lora_not_inside, IS_GATE>(cuda, s, lora_not_inside());
}

template <bool IS_GATE> static void launch(struct cuda_device *cuda, const struct streamed *s)
{
    if (s->T <= FEW_TOKENS)
        launch_tokens<FEW_TOKENS, IS_GATE>(cuda, s);
    else
        launch_tokens<STREAM_TOKENS, IS_GATE>(cuda, s);
}

/* Take up what lora_shrink left, if it is for this x and w, and no more than a block has room for. */
static bool take_up_lora(struct cuda_device *cuda, struct streamed *s)
{
    const struct left *left = &cuda->left;
    const struct lora_args *args = &left->args;
    struct lora_inside lora = {};

    if (!left->x || !left->is_plain || !cuda->maps_of_memory || left->x != s->x ||
        args->K != s->w.K || args->K % (INSIDE_STEP / 2) != 0) /* half a step may be the last */
        return false;
    for (int i = 0; i < args->n_slices; i++)
        if (args->width[i] % ROWS != 0) return false; /* a tile would be of two slices */
    lora.args = *args;
    lora.x = s->x;
    lora.exchange = cuda->exchange;
    lora.maps = cuda->maps_of_memory;
    /* Those at first that need not add anything: of a tile's blocks the later ones, and those that have no
     * tile where there are more multiprocessors. */
    lora.n_blocks = cuda->n_sms;
    lora.first = s->shares > 1 ? s->tiles : 0;
    lora.tiles_a_slice = ceil_div(args->max_rank, SIXTEEN);
    lora.row_tiles = args->n_slices * lora.tiles_a_slice;
    /* Units of one round of the blocks, if the tokens' part of x is one that they can keep. */
    const int token_tiles = lora_tiles(args, SIXTEEN);
    const int units = token_tiles * lora.row_tiles * INSIDE_PARTS;
    lora.tiles_a_unit = ceil_div(args->K, INSIDE_STEP) <= INSIDE_PARTS * INSIDE_WARPS * INSIDE_AHEAD
                            ? min_int(ceil_div(units, lora.n_blocks), UNIT_TILES)
                            : 1;
    lora.n_units = token_tiles * ceil_div(lora.row_tiles, lora.tiles_a_unit) * INSIDE_PARTS;
    lora.tiles_a_share = INSIDE_TILES / s->shares; /* whatever the other adapters' ranks are */
    const int tokens = s->T <= FEW_TOKENS ? FEW_TOKENS : STREAM_TOKENS;
    const int tiles = min_int(lora.tiles_a_slice, lora.tiles_a_share);
    lora.row_bytes = (tiles == 3 ? 4 : tiles) * NARROW_ROW; /* the copies know no row of three */
    /* The rows of a small product that begins at the last eight are all there. */
    lora.h_columns = GROUP + min_int(args->n_segments * ceil_div(args->max_segment, GROUP) * GROUP,
                                     (args->n_tokens / GROUP + args->n_segments) * GROUP);
    lora.added_bytes = GROUP_ROWS * tokens * (int)sizeof(float);
    if (lora.tiles_a_slice > INSIDE_TILES || args->n_segments > INSIDE_SEGMENTS ||
        args->n_tokens > s->T || plan_places(&lora, room_of_places(tokens), 1) == 0)
        return false;
    if (cuda->beside.n > 0) return false; /* STAGES_BESIDE are too few to take some of them */
    s->lora = lora;
    s->has_lora = true;
    cuda->left.x = NULL;
    cuda->delta.is_added = true;
    return true;
}

bool matmul_stream(struct cuda_device *cuda, float *y, const bf16 *x, const struct matrix *w,
                   const float *bias, int T)
{
    enum { WAVES_MAX = 4 }; /* what a block brings in ahead is worth less in later ones */
    const int tiles = ceil_div(w->N, ROWS);
    struct streamed s = {y, NULL, x, *w, bias, T, tiles, 1, STAGES_MAX, false, {}};
    struct addend addend = {};

    if (!cuda->encode_tensor_map || cuda->is_lent || T > STREAM_TOKENS || w->K % GROUP != 0 ||
        !is_aligned(x) || !is_aligned(w->data) || tiles > WAVES_MAX * cuda->n_sms)
        return false;
    s.shares = shares_of(cuda, tiles, ceil_div(w->K, PANEL));
    addend.n_parts = s.shares - 1;
    addend.part = (size_t)T * w->N;
    if (s.shares > 1) {
        const size_t bytes = (size_t)PRODUCT_PARTS * STREAM_TOKENS * w->N * sizeof(float);
        s.parts = (float *)cuda_grow(cuda, &cuda->parts, bytes, "matmul");
        if (!s.parts) return true;
        addend.parts = s.parts;
    }
    if (!take_up_lora(cuda, &s) && cuda->left.x) lora_make_left(cuda);
    if (cuda->beside.n > 0) s.stages = STAGES_BESIDE;
    if (s.shares == 1 && w->N % ROWS == 0) {
        *cuda->held = s;
        cuda->held_y = y;
        return true;
    }
    launch<false>(cuda, &s);
    if (s.shares > 1) cuda_defer(cuda, y, DTYPE_F32, T, w->N, &addend);
    return true;
}

void matmul_make_held(struct cuda_device *cuda)
{
    cuda->held_y = NULL;
    launch<false>(cuda, cuda->held);
}

bool matmul_takes_silu(struct cuda_device *cuda, void *y, const void *gate_up,
                       enum dtype gate_up_dtype, int T, int F, enum dtype dtype)
{
    struct streamed *s = cuda->held;

    if (!cuda->held_y || cuda->held_y != gate_up || gate_up_dtype != DTYPE_F32 ||
        dtype != DTYPE_BF16 || s->T != T || s->w.N != 2 * F || !is_aligned(y))
        return false;
    if (s->has_lora && s->lora.args.n_slices != 2) return false;
    cuda->held_y = NULL;
    s->y = y;
    launch<true>(cuda, s);
    return true;
}

/* Maps for B of each rank that a product takes up, in the device's memory: map_of_b(). Where the driver makes
 * none, products take up nothing. */
static cudaError_t make_maps(struct cuda_device *cuda)
{
    CUtensorMap maps[B_MAPS] = {};

    if (!cuda->encode_tensor_map) return cudaSuccess;
    for (int row_bytes = 32; row_bytes <= PANEL_ROW; row_bytes *= 2)
        for (int R = GROUP; R <= INSIDE_TILES * SIXTEEN; R += GROUP)
            if (!map_memory(cuda, &maps[map_of_b(row_bytes, R)], R, GROUP_ROWS, row_bytes))
                return cudaSuccess;
    cudaError_t error = cudaMalloc((void **)&cuda->maps_of_memory, sizeof maps);
    if (error != cudaSuccess) return error;
    return cudaMemcpy(cuda->maps_of_memory, maps, sizeof maps, cudaMemcpyHostToDevice);
}

cudaError_t matmul_open(struct cuda_device *cuda)
{
    struct exchange *exchange;

    cuda->held = (struct streamed *)calloc(1, sizeof *cuda->held);
    if (!cuda->held) return cudaErrorMemoryAllocation;
    cudaError_t error = cudaMalloc((void **)&exchange, sizeof *exchange);
    if (error != cudaSuccess) return error;
    cuda->exchange = exchange;
    error = make_maps(cuda);
    if (error != cudaSuccess) return error;
    error = cudaMemsetAsync(exchange->h, 0xff, sizeof exchange->h, cuda->stream); /* NOTHING */
    if (error != cudaSuccess) return error;
    return cudaMemsetAsync(&exchange->turn, 0, sizeof *exchange - sizeof exchange->h, cuda->stream);
}
