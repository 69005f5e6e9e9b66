/* Attention of rows of one token. Bound by reading the row's keys and values once, so the query
 * heads of a group share what is loaded: they are the columns of small matrix products, padded to
 * eight, and the tokens or the elements of a head are the rows. Each warp works on a block of the
 * cache (16 tokens, contiguous for a head) at a time with its own queue of copies, so that no
 * barrier stands in the loop.
 *
 * In a step nothing writes to pages of a row of one token but the last one: copies of the others begin
 * while the kernels before this one still run. Where this kernel does what rope is for, too, so that
 * queries and the new key and value need not go through memory and another kernel, those of the last page
 * do as well. */
#include "kernels/cuda/attention_pages.cuh"

#include <math.h>

/* ---- kernels ------------------------------------------------------------------------------ */

enum {
    DECODE_HEADS = 8, /* columns of a product */

    /* A row's pages are shared out over at most SPLITS_MAX blocks of WARPS_MIN to max_warps() warps,
     * each of which has WARP_PAGES_MIN to WARP_PAGES_MAX of them, about: see shares_of(). */
    SPLITS_MAX = 64,
    WARPS_MIN = 4,
    WARP_PAGES_MIN = 2,
    WARP_PAGES_MAX = 16,
    TURNED_MAX = 6400, /* bytes of a struct turned */
    /* Shared memory beside queues, at most. */
    DECODE_STATIC = DECODE_HEADS * SPLITS_MAX * 4 + TURNED_MAX + 2048,
};

/* Warps of a block, for which there are registers. */
static constexpr __host__ __device__ int max_warps(int d)
{
    return d <= 128 ? 16 : 8;
}

/* Before Hopper the compiler takes so few registers for heads of 64 that some spill, if it is not told
 * that one block of a multiprocessor will do; 0: nothing is said. */
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
enum { BLOCKS_OF_64 = 1 };
#else
enum { BLOCKS_OF_64 = 0 };
#endif

template <int D, typename Pages> static constexpr __host__ __device__ int decode_shared(int n_warps)
{
    const int queues = n_warps * queue(D) * unit_bytes<D, Pages>();
    const int merge = n_warps * DECODE_HEADS * (D + 2) * 4;
    const int rest = Pages::ARE_BOXES ? 1024 : 0; /* to begin at a multiple of 1,024 */
    return (queues > merge ? queues : merge) + rest;
}

/* A row's partial results: sums [Q, H, splits, d], and their largest score and total weight
 * [Q, H, splits, 2]. */
struct decode_parts {
    float *sums, *stats;
    int pages; /* of the cache to a split */
    int max_splits;
};

/* What a block turns itself, of its token: queries, then the key and the value. In rows of pitch() elements. */
enum { KEY = DECODE_HEADS, VALUE, TURNED };
template <int D> struct turned {
    float cosine[D / 2], sine[D / 2];
    __align__(16) bf16 head[TURNED][pitch(D)];
};
static_assert(sizeof(struct turned<256>) <= TURNED_MAX);

/* Heads h0 to h0 + n_heads - 1 of token t, and with them, where has_last, the key and the value of group g,
 * as rope makes them; those go to the cache, too, where there is a slot.
 *
 *   qkv [T, H + 2 G, D]    key_slot, value_slot [D], or NULL */
template <int D, typename X>
static __device__ void turn_heads(struct turned<D> *to, const X *qkv, const struct turn &turn,
                                  const struct attention_args &args, int t, int g, int h0,
                                  int n_heads, bool has_last, bf16 *key_slot, bf16 *value_slot)
{
    enum { ITEMS = D / (2 * GROUP) }; /* of a head */
    const int n = (n_heads + (has_last ? 2 : 0)) * ITEMS;
    for (int item = threadIdx.x; item < n; item += blockDim.x) {
        const int which = item / ITEMS, i = item % ITEMS * GROUP;
        const bool is_key = which == n_heads, is_value = which > n_heads;
        const int h = is_value ? args.H + args.G + g : is_key ? args.H + g : h0 + which;
        const size_t at = ((size_t)t * (args.H + 2 * args.G) + h) * D + i;
        float a[GROUP], b[GROUP];
        load_halves(a, b, qkv + at, turn.addend, is_added(turn.addend), at, D / 2);
        if (turn.frequency && !is_value) turn_pairs<X>(a, b, to->cosine + i, to->sine + i);
        bf16 *head = to->head[is_value ? VALUE : is_key ? KEY : which];
        store_group(head + i, a);
        store_group(head + i + D / 2, b);
        bf16 *slot = is_value ? value_slot : is_key ? key_slot : NULL;
        if (!slot) continue;
        store_group(slot + i, a);
        store_group(slot + i + D / 2, b);
    }
}

/* Add up the parts of a row's heads in the order of the splits. */
template <int D>
static __device__ void combine(bf16 *y, const struct decode_parts &parts, size_t head0, int n_heads,
                               int splits)
{
    __shared__ float weight[DECODE_HEADS][SPLITS_MAX];

    for (int i = threadIdx.x; i < n_heads * WARP; i += blockDim.x) {
        /* a warp a head: its weights, exp2(max - largest max) / total */
        const int head = i / WARP, lane = i % WARP;
        const float2 *stats = (const float2 *)parts.stats + (head0 + head) * parts.max_splits;
        float max = -INFINITY, total = 0.0f;
        for (int s = lane; s < splits; s += WARP) max = fmaxf(max, __ldcg(&stats[s]).x);
        for (int step = WARP / 2; step > 0; step /= 2)
            max = fmaxf(max, __shfl_xor_sync(~0u, max, step));
        for (int s = lane; s < splits; s += WARP) {
            const float2 part = __ldcg(&stats[s]);
            weight[head][s] = fast_exp2(part.x - max);
            total += weight[head][s] * part.y;
        }
        total = warp_sum(total);
        for (int s = lane; s < splits; s += WARP) weight[head][s] /= total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < n_heads * D / 4; i += blockDim.x) {
        const int head = i / (D / 4), column = i % (D / 4) * 4;
        const float *sums = parts.sums + (head0 + head) * parts.max_splits * D + column;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 16
        for (int s = 0; s < splits; s++) {
            const float4 part = __ldcg((const float4 *)(sums + (size_t)s * D));
            const float w = weight[head][s];
            sum.x += w * part.x, sum.y += w * part.y, sum.z += w * part.z, sum.w += w * part.w;
        }
        *(uint2 *)(y + (head0 + head) * D + column) =
            make_uint2(pack_bf16(sum.x, sum.y), pack_bf16(sum.z, sum.w));
    }
}

/* Of a row of one token, up to eight heads of a group, one split of its positions; with turn.is_wanted after
 * what rope does to them.
 * Scores of 16 tokens: S [16 tokens, 8 heads] = K Q^T; then O [D, 8 heads] += V^T P.
 *
 *   y [T, H, D]    qkv [T, H + 2 G, D], or f32    pages: k, v [., G, KV_BLOCK, D]
 *   grid (splits, G * heads / 8, Q)    block: some warps    shared decode_shared<D, Pages>(warps) */
template <int D, typename Pages>
static __global__ void __launch_bounds__(max_warps(D) * WARP, D == 64 ? BLOCKS_OF_64 : 0)
    attention_decode_kernel(bf16 *y, const void *qkv, const __grid_constant__ Pages pages,
                            const struct attention_args args, struct turn turn,
                            const struct decode_parts parts, int *counters)
{
    enum { QUEUE = queue(D) };
    extern __shared__ __align__(16) unsigned char unaligned[];
    __shared__ uint64_t barriers[Pages::ARE_BOXES ? max_warps(D) : 1][QUEUE];
    __shared__ struct turned<D> turned;
    const uint32_t to_align = Pages::ARE_BOXES ? -shared_address(unaligned) % 1024 : 0;
    unsigned char *shared = unaligned + to_align;
    const int row = blockIdx.z, H = args.H, G = args.G, group = H / G;
    const int head_parts = ceil_div(group, DECODE_HEADS);
    const int g = blockIdx.y / head_parts, in_group = blockIdx.y % head_parts * DECODE_HEADS;
    const int n_heads = min_int(DECODE_HEADS, group - in_group);
    const int h0 = g * group + in_group;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int n_warps = blockDim.x / WARP;
    grid_release();
    const int t = args.row_start[row];
    const int n_tokens = args.row_start[row + 1] - t;

    const int end = args.kv_len[row], begin = first_seen(args, end - 1);
    const int page0 = begin / KV_BLOCK, n_pages = ceil_div(end, KV_BLOCK) - page0;
    const int splits = ceil_div(n_pages, parts.pages);
    const int split_begin = page0 + blockIdx.x * parts.pages;
    const int split_end = min_int(split_begin + parts.pages, page0 + n_pages);
    const int own_page = page0 + n_pages - 1; /* the token's */
    const bool has_last = split_end > own_page;

    page_reader<D, Pages> reader;
    reader.table = args.block_table + (size_t)row * args.max_blocks;
    reader.G = G;
    reader.g = g;
    reader.copies = shared_address(shared) + warp * (QUEUE * reader.UNIT);
    reader.first = split_begin + warp;
    reader.step = n_warps;
    reader.n = ceil_div(max_int(0, split_end - reader.first), n_warps);
    reader.end = end;
    if constexpr (Pages::ARE_BOXES) {
        reader.barriers = shared_address(barriers[warp]);
        reader.make_barriers();
    }
    reader.look_up(0); /* the table was uploaded */
    /* The whole block: a longer row is attention_prefill's. */
    const bool is_used = n_tokens == 1 && (int)blockIdx.x < splits;
    int unit = 0;
    if (is_used) {
        int written = args.keeps_pages ? (end - 1) / KV_BLOCK : 0; /* from this page on */
        if (turn.is_wanted) written = split_end; /* by this kernel, once it has come */
        while (unit < QUEUE - 1 && unit / 2 < reader.n &&
               reader.first + unit / 2 * n_warps < written)
            reader.start(pages, unit++);
        if (unit / 2 < reader.n) reader.prefetch(pages, unit / 2);
        if (turn.is_wanted) make_angles(turned.cosine, turned.sine, turn, end - 1, D / 2);
    }
    if (turn.is_wanted && is_used) turn.addend = addend_of(turn.addend, t);
    grid_wait();
    if (!is_used) return;
    while (unit < QUEUE - 1) reader.start(pages, unit++);
    if (turn.is_wanted) {
        const int32_t *table = args.block_table + (size_t)row * args.max_blocks;
        const size_t slot =
            (((size_t)table[own_page] * G + g) * KV_BLOCK + (end - 1) % KV_BLOCK) * D;
        const bool writes = has_last && in_group == 0;
        bf16 *key_slot = writes ? pages.k + slot : NULL,
             *value_slot = writes ? pages.v + slot : NULL;
        __syncthreads(); /* the angles are there */
        if (args.has_f32_queries)
            turn_heads(&turned, (const float *)qkv, turn, args, t, g, h0, n_heads, has_last,
                       key_slot, value_slot);
        else
            turn_heads(&turned, (const bf16 *)qkv, turn, args, t, g, h0, n_heads, has_last,
                       key_slot, value_slot);
        __syncthreads();
    }

    /* Q^T: column lane / 4 is head h0 + lane / 4. */
    uint32_t q[D / 16][2];
    const size_t query =
        ((size_t)t * (H + 2 * G) + h0 + min_int(lane / 4, n_heads - 1)) * D + lane % 4 * 2;
#pragma unroll
    for (int s = 0; s < D / 16; s++) {
        if (turn.is_wanted) {
            const bf16 *from = turned.head[min_int(lane / 4, n_heads - 1)] + lane % 4 * 2 + s * 16;
            q[s][0] = *(const uint32_t *)from;
            q[s][1] = *(const uint32_t *)(from + 8);
            continue;
        }
        q[s][0] = query_pair(args, qkv, query + s * 16);
        q[s][1] = query_pair(args, qkv, query + s * 16 + 8);
    }

    float out[D / 16][4] = {};
    float max[2] = {-INFINITY, -INFINITY}, total[2] = {}; /* of heads 2 (lane % 4) and the next */
    for (int i = 0; i < reader.n; i++) {
        float score[2][4] = {};
        const bool is_own = turn.is_wanted && reader.first + i * n_warps == own_page;
        reader.wait(2 * i);
        if (is_own) reader.put(2 * i, (end - 1) % KV_BLOCK, turned.head[KEY]);
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
            uint32_t a[4];
            load_matrices(a, reader.at(2 * i, lane % 16, 2 * s + lane / 16));
            mma_bf16(score[s % 2], a, q[s][0], q[s][1]);
        }
        __syncwarp(); /* all lanes have read what the next copy overwrites later */
        reader.start(pages, 2 * i + QUEUE - 1);

        const int p = (reader.first + i * n_warps) * KV_BLOCK + lane / 4;
        float weight[4]; /* of (token p, two heads), (token p + 8, two heads) */
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const int at = p + e / 2 * 8;
            weight[e] =
                at >= begin && at < end ? (score[0][e] + score[1][e]) * args.scale : -INFINITY;
        }
#pragma unroll
        for (int c = 0; c < 2; c++) {
            float new_max = fmaxf(weight[c], weight[c + 2]);
#pragma unroll
            for (int step = 4; step < WARP; step *= 2)
                new_max = fmaxf(new_max, __shfl_xor_sync(~0u, new_max, step));
            new_max = fmaxf(new_max, max[c]); /* a page has a token that is seen: finite */
            const float keep = fast_exp2(max[c] - new_max);
            max[c] = new_max;
            weight[c] = fast_exp2(weight[c] - new_max);
            weight[c + 2] = fast_exp2(weight[c + 2] - new_max);
            total[c] = total[c] * keep + weight[c] + weight[c + 2];
#pragma unroll
            for (int s = 0; s < D / 16; s++) out[s][c] *= keep, out[s][c + 2] *= keep;
        }
        const uint32_t p0 = transpose_matrix(pack_bf16(weight[0], weight[1]));
        const uint32_t p1 = transpose_matrix(pack_bf16(weight[2], weight[3]));

        reader.wait(2 * i + 1);
        if (is_own) reader.put(2 * i + 1, (end - 1) % KV_BLOCK, turned.head[VALUE]);
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
            uint32_t a[4];
            load_matrices_transposed(
                a, reader.at(2 * i + 1, lane % 8 + lane / 16 * 8, 2 * s + lane / 8 % 2));
            mma_bf16(out[s], a, p0, p1);
        }
        __syncwarp();
        reader.start(pages, 2 * i + 1 + QUEUE - 1);
    }
    if constexpr (!Pages::ARE_BOXES) copy_wait<0>();
    __syncthreads(); /* the queues become the place where the warps' results are merged */

    float *merge = (float *)shared;                    /* [warps, heads, D] */
    float *stats = merge + n_warps * DECODE_HEADS * D; /* [warps, heads, 2] */
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
        for (int step = 4; step < WARP; step *= 2) total[c] += __shfl_xor_sync(~0u, total[c], step);
        const int head = warp * DECODE_HEADS + lane % 4 * 2 + c;
        if (lane < 4) stats[head * 2] = max[c], stats[head * 2 + 1] = total[c];
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
            merge[head * D + s * 16 + lane / 4] = out[s][c];
            merge[head * D + s * 16 + lane / 4 + 8] = out[s][c + 2];
        }
    }
    __syncthreads();

    const size_t part_head = (size_t)row * H + h0; /* [Q, H]; y is [T, H] */
    for (int i = threadIdx.x; i < n_heads * D; i += blockDim.x) {
        const int head = i / D, column = i % D;
        float largest = -INFINITY, sum = 0.0f, weights = 0.0f;
#pragma unroll 4
        for (int w = 0; w < n_warps; w++)
            largest = fmaxf(largest, stats[(w * DECODE_HEADS + head) * 2]);
#pragma unroll 4
        for (int w = 0; w < n_warps; w++) {
            const int from = w * DECODE_HEADS + head;
            const float weight = fast_exp2(stats[from * 2] - largest); /* 0 for an idle warp */
            sum += weight * merge[from * D + column];
            weights += weight * stats[from * 2 + 1];
        }
        if (splits == 1) {
            y[((size_t)t * H + h0 + head) * D + column] = narrow<bf16>(sum / weights);
        } else {
            const size_t part = (part_head + head) * parts.max_splits + blockIdx.x;
            parts.sums[part * D + column] = sum;
            if (column == 0) parts.stats[part * 2] = largest, parts.stats[part * 2 + 1] = weights;
        }
    }
    if (splits == 1) return; /* the whole block */
    if (arrives_last(&counters[row * gridDim.y + blockIdx.y], splits)) {
        /* combine() counts heads as [Q, H]: let y's row t stand where row `row` is */
        combine<D>(y + ((size_t)t - row) * H * D, parts, part_head, n_heads, splits);
    }
}

/* ---- launchers ---------------------------------------------------------------------------- */

/* How the pages of a row, for some heads of it, are shared out. */
struct shares {
    int warps; /* of a block */
    int pages; /* of a split, which is a block's */
    int splits;
};

/* As many warps a row as let the rows fill the chip about once. They are spread over as many
 * multiprocessors as there are, but no further: parts of different blocks have to be written and
 * read again. No warp has so many pages that one long row among short ones is slow. So the places
 * where a row is cut, and the rounding of its sum, depend on how many rows there are and on the
 * longest; nothing else of a row depends on its neighbours. */
static struct shares shares_of(const struct cuda_device *cuda, int rows_of_heads, int d, int max_kv)
{
    const int max_pages = ceil_div(max_kv, KV_BLOCK);
    const int blocks = ceil_div(rows_of_heads, cuda->n_sms); /* of a multiprocessor */
    const int splits = max_int(1, cuda->n_sms / rows_of_heads);
    int room = 0; /* shared memory that a block may have */
    struct shares shares;

    if (cudaDeviceGetAttribute(&room, cudaDevAttrMaxSharedMemoryPerBlockOptin, cuda->ordinal))
        room = 0;
    const int fit = (room - DECODE_STATIC) / (queue(d) * KV_BLOCK * pitch(d) * 2);
    const int most_warps = min_int(fit, max_int(WARPS_MIN, max_warps(d) / blocks));
    shares.pages = ceil_div(max_pages, splits);
    shares.warps = min_int(most_warps, max_int(WARPS_MIN, shares.pages / WARP_PAGES_MIN));
    shares.pages = max_int(shares.pages, shares.warps * WARP_PAGES_MIN);
    shares.pages = min_int(shares.pages, shares.warps * WARP_PAGES_MAX);
    shares.pages = max_int(shares.pages, ceil_div(max_pages, SPLITS_MAX));
    shares.splits = max_int(1, ceil_div(max_pages, shares.pages));
    return shares;
}

size_t attention_decode_bytes(const struct cuda_device *cuda, int Q, int H, int G, int d,
                              int max_kv)
{
    const struct shares shares = shares_of(cuda, Q * G * ceil_div(H / G, DECODE_HEADS), d, max_kv);
    return shares.splits > 1 ? (size_t)Q * H * shares.splits * (d + 2) * sizeof(float) : 0;
}

template <int D, typename Pages>
static void launch_pages(struct cuda_device *cuda, bf16 *y, const void *qkv, const Pages &pages,
                         const struct attention_args *args, const struct turn *turn, int max_kv)
{
    const int head_parts = ceil_div(args->H / args->G, DECODE_HEADS);
    const struct shares shares = shares_of(cuda, args->Q * args->G * head_parts, D, max_kv);
    struct decode_parts parts = {NULL, NULL, shares.pages, shares.splits};
    const dim3 grid(parts.max_splits, args->G * head_parts, args->Q);
    const int shared = decode_shared<D, Pages>(shares.warps);
    const auto kernel = attention_decode_kernel<D, Pages>;

    if (parts.max_splits > 1) {
        assert(args->Q * args->G * head_parts <= COUNTERS);
        const size_t n = (size_t)args->Q * args->H * parts.max_splits;
        parts.sums = (float *)cuda_scratch(cuda, n * (D + 2) * sizeof(float), "attention");
        if (!parts.sums) return;
        parts.stats = parts.sums + n * D;
    }
    cuda_allow_shared(cuda, kernel, shared, "attention");
    cuda_launch(cuda, "attention", kernel, grid, shares.warps * WARP, shared, 1, y, qkv, pages,
                *args, *turn, parts, cuda->counters);
}

template <int D>
static void launch(struct cuda_device *cuda, bf16 *y, const void *qkv, bf16 *k, bf16 *v,
                   const struct attention_args *args, const struct turn *turn, int max_kv)
{
    if constexpr (D % (2 * PANEL) == 0) /* of 64 the units come sooner */
        if (cuda->encode_tensor_map) {
            const struct page_boxes boxes = {k, v, map_cache(cuda, k, D), map_cache(cuda, v, D)};
            launch_pages<D>(cuda, y, qkv, boxes, args, turn, max_kv);
            return;
        }
    const struct page_rows rows = {k, v};
    launch_pages<D>(cuda, y, qkv, rows, args, turn, max_kv);
}

void attention_decode(struct cuda_device *cuda, bf16 *y, const void *qkv, bf16 *k, bf16 *v,
                      const struct attention_args *args, const struct turn *turn, int max_kv)
{
    switch (args->d) {
    case 64:
        launch<64>(cuda, y, qkv, k, v, args, turn, max_kv);
        break;
    case 80:
        launch<80>(cuda, y, qkv, k, v, args, turn, max_kv);
        break;
    case 96:
        launch<96>(cuda, y, qkv, k, v, args, turn, max_kv);
        break;
    case 128:
        launch<128>(cuda, y, qkv, k, v, args, turn, max_kv);
        break;
    default:
        launch<256>(cuda, y, qkv, k, v, args, turn, max_kv);
        break;
    }
}
