/* The second half of LoRA inside the streaming product: B times h, by the warps that make h, a warpgroup
 * whose products have 64 rows of B and up to 16 tokens of a segment. Those that multiply x by w find the
 * result in shared memory. Of the ring of w it takes stages that have served to bring w in ahead of x. */
#ifndef MLORA_KERNELS_CUDA_LORA_INSIDE_ADD_CUH
#define MLORA_KERNELS_CUDA_LORA_INSIDE_ADD_CUH

#include "kernels/cuda/lora_inside.cuh"

enum { GROUP_ROWS = 64 /* of y, that a warpgroup multiplies x by */ };
enum { MAP_RANKS = INSIDE_TILES * SIXTEEN / GROUP, B_MAPS = 3 * MAP_RANKS };

/* Which of the maps of all memory brings `row_bytes` of a row of B of rank R. */
static inline __host__ __device__ int map_of_b(int row_bytes, int R)
{
    return row_bytes / 64 * MAP_RANKS + R / GROUP - 1;
}

/* h of the block's tiles of the rank in shared memory, [tiles, H_PARTS, h_columns, 16]. */
static inline __host__ __device__ int h_bytes(const struct lora_inside *in)
{
    return min_int(in->tiles_a_slice, in->tiles_a_share) * H_PARTS * in->h_columns * NARROW_ROW;
}

#ifdef __CUDACC__

static inline __device__ uint32_t kept_end(const struct ring_of_w &ring)
{
    return ring.at + ring.kept * ring.stage_bytes;
}

/* Place `place` of B, [segments, 2 / HALVES, 64, row_bytes]; behind the last are h, and what is added. */
template <int HALVES>
static inline __device__ uint32_t place_of_b(const struct lora_inside &in,
                                             const struct inside_shared *shared, int place)
{
    return kept_end(shared->ring) +
           place * in.segments_a_place * (2 / HALVES * GROUP_ROWS) * in.row_bytes;
}

/* What is added to a group's rows: [64, TOKENS] f32. Of row r, token t is at t ^ turned_by(r), so that stores
 * and loads of a warp find different banks, or two of a bank. */
template <int TOKENS, int HALVES>
static inline __device__ uint32_t added_to(const struct lora_inside &in,
                                           const struct inside_shared *shared, int group)
{
    return place_of_b<HALVES>(in, shared, in.n_places) + h_bytes(&in) +
           group * (GROUP_ROWS * TOKENS * (int)sizeof(float));
}

template <int TOKENS> static inline __device__ int turned_by(int row)
{
    return row / 4 % 2 * 4 + (TOKENS < 32 ? row / 2 % 2 : row % 4) * 8;
}

/* Until w has left the stages that it does not keep. */
static inline __device__ void wait_for_stages(const struct inside_shared *shared)
{
    const struct ring_of_w &ring = shared->ring;
#pragma unroll 1
    for (int stage = ring.kept; stage < min_int(ring.stages, ring.n); stage++)
        barrier_wait(ring.empty + stage * 8, 0);
}

/* A product of a segment's B with h of up to 16 of its tokens. */
struct job {
    int slot;     /* of B in shared memory: of all places' segments */
    int place;    /* which it is in... */
    int turn;     /* ... whose use this is, even or odd */
    int begins;   /* the first that wants the place */
    int ends;     /* the last */
    int tiles;    /* of the rank */
    int n_tokens; /* from `first` on, in the segments' order */
    int first;
    int eights; /* columns of h that come before */
};

static inline __device__ uint32_t bits_of(const struct job &job)
{
    static_assert(2 * INSIDE_SEGMENTS <= 32 && INSIDE_PLACES <= 4 && INSIDE_TILES < 8);
    static_assert(INSIDE_TOKENS <= 64 &&
                  INSIDE_TOKENS + GROUP * INSIDE_SEGMENTS <= 256); /* columns */
    return job.slot | job.place << 5 | job.turn << 7 | job.begins << 8 | job.ends << 9 |
           job.tiles << 10 | job.n_tokens << 13 | job.first << 18 | job.eights << 24;
}

static inline __device__ struct job job_of(uint32_t bits)
{
    return {(int)(bits & 31),       (int)(bits >> 5 & 3),   (int)(bits >> 7 & 1),
            (int)(bits >> 8 & 1),   (int)(bits >> 9 & 1),   (int)(bits >> 10 & 7),
            (int)(bits >> 13 & 31), (int)(bits >> 18 & 63), (int)(bits >> 24)};
}

/* How a lane's segment passes through the places of B in a slice. */
struct passage {
    const bf16 *b; /* its rows, from the block's first on */
    int R, tiles;  /* 0 tiles: it does not */
    int slot, turn;
};

static inline __device__ struct passage passage_of(const struct lora_inside &in,
                                                   const struct lora_segment &segment, int half,
                                                   const struct inside_shared *shared)
{
    struct passage passage = {};
    if (segment.n == 0) return passage;
    const struct lora_factors *f = lora_factors_of(in.args, segment.slot, shared->slice + half);
    if (!f->a) return passage;
    passage.R = f->R;
    passage.b = (const bf16 *)f->b + (size_t)shared->row * f->R;
    passage.tiles =
        max_int(0, min_int(shared->share.tiles, ceil_div(f->R, SIXTEEN) - shared->share.first));
    prefetch_map(&in.maps[map_of_b(in.row_bytes, f->R)]);
    return passage;
}

/* By a warp: the jobs of a lane's segment in a slice, whose columns of h begin at `column`, and its place, of
 * which `places` have been used before. How many are used after it. */
static inline __device__ int list_jobs(const struct lora_inside &in, int lane,
                                       const struct lora_segment &segment, int half, int column,
                                       int places, struct passage &passage,
                                       struct inside_shared *shared)
{
    const unsigned passing = __ballot_sync(~0u, passage.tiles > 0);
    const int n_passing = __popc(passing), before = __popc(passing & ((1u << lane) - 1));
    const int in_place = before % in.segments_a_place;
    const int place = places + before / in.segments_a_place;
    const int n = passage.tiles > 0 ? ceil_div(segment.n, SIXTEEN) : 0;
    const int j = sum_upto(n, lane) - n;
    const int most = __reduce_max_sync(~0u, passage.tiles);
    const bool is_last = in_place == in.segments_a_place - 1 || before == n_passing - 1;
    struct job job = {};

    passage.turn = place / in.n_places;
    passage.slot = place % in.n_places * in.segments_a_place + in_place;
    job.slot = passage.slot;
    job.place = place % in.n_places;
    job.turn = passage.turn % 2;
    job.tiles = passage.tiles;
#pragma unroll 1
    for (int i = 0; i < n; i++) {
        job.begins = in_place == 0 && i == 0;
        job.ends = is_last && i == n - 1;
        job.n_tokens = min_int(SIXTEEN, segment.n - i * SIXTEEN);
        job.first = segment.start + i * SIXTEEN;
        job.eights = column / GROUP + i * 2;
        shared->jobs[half][j + i] = bits_of(job);
    }
    if (lane == WARP - 1) shared->n_jobs[half] = j + n, shared->tiles[half] = most;
    if (lane < in.args.n_segments) shared->R[half][lane] = (unsigned char)passage.R;
    if (lane < INSIDE_TOKENS / WARP) shared->adds[half][lane] = 0;
    return places + ceil_div(n_passing, in.segments_a_place);
}

/* By a warp: whose the tokens are, and what there is to multiply. What can be is asked for at once. */
template <int HALVES>
static inline __device__ void find_segments(const struct lora_inside &in, int lane,
                                            struct passage (&passages)[HALVES],
                                            struct inside_shared *shared)
{
    enum { A_LANE = INSIDE_TOKENS / WARP };
    static_assert(INSIDE_SEGMENTS <= WARP);
    const struct lora_args &args = in.args;
    const struct lora_segment own = lora_segment_at(args, lane);
    const int end = lane < args.n_segments ? args.segment_start[lane + 1] : 0;
    int t[A_LANE], segment[A_LANE] = {};
#pragma unroll
    for (int i = 0; i < A_LANE; i++)
        t[i] = lane + i * WARP < args.n_tokens ? args.order[lane + i * WARP] : 0;
#pragma unroll
    for (int half = 0; half < HALVES; half++) passages[half] = passage_of(in, own, half, shared);
    const int columns = ceil_div(own.n, GROUP) * GROUP, column = sum_upto(columns, lane) - columns;
    int places = 0;
#pragma unroll
    for (int half = 0; half < HALVES; half++)
        places = list_jobs(in, lane, own, half, column, places, passages[half], shared);
    __syncwarp();
#pragma unroll 1
    for (int s = 0; s < args.n_segments; s++) {
        const int of = __shfl_sync(~0u, end, s);
#pragma unroll
        for (int i = 0; i < A_LANE; i++) segment[i] += lane + i * WARP >= of;
    }
#pragma unroll
    for (int i = 0; i < A_LANE; i++) {
        const int at = lane + i * WARP;
        const bool is_one = at < args.n_tokens && segment[i] < args.n_segments;
        const int ahead = __shfl_sync(~0u, column - own.start, is_one ? segment[i] : 0);
        shared->token[at] = (signed char)t[i];
        shared->segment[at] = (signed char)(is_one ? segment[i] : -1);
        shared->column[at] = (unsigned char)(at + ahead);
#pragma unroll
        for (int half = 0; half < HALVES; half++)
            if (is_one && shared->R[half][segment[i]] > shared->share.first * SIXTEEN)
                atomicOr(&shared->adds[half][t[i] / WARP], 1u << t[i] % WARP);
    }
    barrier_arrive(shared_address(&shared->segments_known));
}

/* By the same warp: ask the copy engine for all rows of B, place after place, a lane for its segment's. */
template <int HALVES>
static inline __device__ void ask_for_b(const struct lora_inside &in,
                                        const struct passage (&passages)[HALVES],
                                        const struct inside_shared *shared)
{
    const int first = shared->share.first * SIXTEEN, panel = GROUP_ROWS * in.row_bytes;
    const uint32_t staged = shared->ring.at + shared->ring.stages * shared->ring.stage_bytes;
    const uint32_t places = place_of_b<HALVES>(in, shared, 0);
    int place = 0, turn = 0;
    wait_for_stages(shared);
#pragma unroll
    for (int half = 0; half < HALVES; half++) {
        const struct passage &passage = passages[half];
        int left = __popc(__ballot_sync(~0u, passage.tiles > 0));
#pragma unroll 1
        for (; left > 0; left -= in.segments_a_place) {
            const uint32_t full = shared_address(&shared->b_full[place]);
            const int slot = passage.slot - place * in.segments_a_place;
            const bool is_own = passage.tiles > 0 && passage.turn == turn && slot >= 0 &&
                                slot < in.segments_a_place;
            if (place_of_b<HALVES>(in, shared, place + 1) > staged)
                barrier_wait(shared_address(&shared->made), 0);
            if (turn > 0) barrier_wait(shared_address(&shared->b_empty[place]), turn - 1);
            barrier_expect(full, is_own ? 2 / HALVES * panel : 0);
            if (is_own) {
                uint32_t to = places + passage.slot * (2 / HALVES) * panel;
#pragma unroll
                for (int group = 0; group < 2 / HALVES; group++, to += panel)
                    copy_rows_once(to, &in.maps[map_of_b(in.row_bytes, passage.R)],
                                   passage.b + group * GROUP_ROWS * passage.R, first, full);
            }
            __syncwarp();
            if (++place == in.n_places) place = 0, turn++;
        }
    }
}

enum { PATIENCE = 1 << 16 /* cycles: four times as long as it takes */ };

/* Parts of h of a tile of 16 of the rank in a slice, all tokens' and all parts, which follow each other. */
static inline __device__ const uint32_t *parts_of_h(const struct lora_inside &in, int half,
                                                    int tile, const struct inside_shared *shared)
{
    const int row_tile = (shared->slice + half) * in.tiles_a_slice + shared->share.first + tile;
    return in.exchange->h[shared->turn] + row_tile * INSIDE_PARTS * in.args.n_tokens * SIXTEEN;
}

/* By one thread: ask for them. They come to where what is added to the second group is later. */
template <int TOKENS, int HALVES>
static inline __device__ void ask_for_h(const struct lora_inside &in, int half, int tile,
                                        bool is_late, struct inside_shared *shared)
{
    static_assert(INSIDE_PARTS * SIXTEEN == GROUP_ROWS);
    const int bytes = INSIDE_PARTS * in.args.n_tokens * SIXTEEN * (int)sizeof(float);
    const uint32_t full = shared_address(&shared->h_full);
    shared->is_late = is_late;
    barrier_expect(full, bytes);
    copy_bulk(added_to<TOKENS, HALVES>(in, shared, 1), parts_of_h(in, half, tile, shared), bytes,
              full);
}

/* What to wait for before a tile's h is asked for: of the first job that has it. */
static inline __device__ int first_of_h(int half, int tile, const struct inside_shared *shared)
{
    int j = 0;
    while (job_of(shared->jobs[half][j]).tiles <= tile) j++;
    return job_of(shared->jobs[half][j]).first * SIXTEEN;
}

/* By one thread: wait for number `at` of a tile's h, and ask for all. If nobody looked first, all blocks would
 * be in the way of the weights. */
template <int TOKENS, int HALVES>
static inline __device__ void wait_for_h(const struct lora_inside &in, int half, int tile, int at,
                                         struct inside_shared *shared)
{
    const uint32_t *from = parts_of_h(in, half, tile, shared) + at;
    const uint32_t start = cycles();
    bool is_late = false;
    while (load_now(from).x == NOTHING && !is_late) {
        __nanosleep(20);
        is_late = cycles() - start > PATIENCE;
    }
    ask_for_h<TOKENS, HALVES>(in, half, tile, is_late, shared);
}

/* h of a tile in a slice, which has been asked for, as parts of bf16 to its columns; zeros past a token's
 * rank. False: some has not come. */
template <int TOKENS, int HALVES>
static inline __device__ bool take_h(const struct lora_inside &in, int half, int tile,
                                     struct inside_shared *shared)
{
    const int n = in.args.n_tokens;
    const uint32_t from = added_to<TOKENS, HALVES>(in, shared, 1);
    const uint32_t to =
        place_of_b<HALVES>(in, shared, in.n_places) + tile * H_PARTS * in.h_columns * NARROW_ROW;
    bool all = true;
#pragma unroll
    for (int k = 0; k < INSIDE_TOKENS * 4 / INSIDE_BLOCK; k++) { /* four of a token's sixteen */
        const int item = worker() + k * INSIDE_BLOCK, i = item / 4, quad = item % 4;
        if (i >= n) continue;
        const int segment = shared->segment[i];
        const int rank =
            segment < 0 ? 0 : shared->R[half][segment] - (shared->share.first + tile) * SIXTEEN;
        if (rank <= 0) continue;
        float sum[4] = {};
        if (quad * 4 < rank)
#pragma unroll
            for (int p = 0; p < INSIDE_PARTS; p++) {
                const uint4 bits = load_shared(from + (p * n * 4 + item) * 16);
                if (bits.x == NOTHING || bits.y == NOTHING || bits.z == NOTHING ||
                    bits.w == NOTHING)
                    all = false, shared->missing = (p * n * 4 + item) * 4;
                sum[0] += __uint_as_float(bits.x), sum[1] += __uint_as_float(bits.y);
                sum[2] += __uint_as_float(bits.z), sum[3] += __uint_as_float(bits.w);
            }
        uint32_t low[H_PARTS], high[H_PARTS];
        split_pair<H_PARTS>(low, sum[0], sum[1]);
        split_pair<H_PARTS>(high, sum[2], sum[3]);
        uint32_t at = to + narrow_at(shared->column[i], quad / 2) + quad % 2 * 8;
#pragma unroll
        for (int p = 0; p < H_PARTS; p++, at += in.h_columns * NARROW_ROW)
            store_shared_pair(at, make_uint2(low[p], high[p]));
    }
    return inside_all(all);
}

/* A number that all lanes have: what follows from it is computed once for all of them, as the operands of
 * products have to be. */
static inline __device__ uint32_t of_all_lanes(uint32_t number)
{
    return __reduce_or_sync(~0u, number);
}

/* What the jobs of a block have in common. It is at hand before h comes, since a warp that is alone in its
 * quarter of the multiprocessor waits for each of its own instructions. */
struct jobs {
    uint64_t b, h;      /* operands: the first place, and the first column */
    int panel, part;    /* of a group's rows of a segment's B, and of a part of h, in 16 bytes */
    uint32_t added;     /* this thread's first row of the first group */
    int turned, column; /* of this thread's rows, and its first */
};

template <int TOKENS, int HALVES>
static inline __device__ struct jobs jobs_of(const struct lora_inside &in,
                                             const struct inside_shared *shared)
{
    const int lane = worker() % WARP, row = worker() / WARP * SIXTEEN + lane / 4;
    struct jobs jobs;
    jobs.b = operand_of_rows(of_all_lanes(place_of_b<HALVES>(in, shared, 0)), in.row_bytes);
    jobs.h = operand_of_rows(of_all_lanes(place_of_b<HALVES>(in, shared, in.n_places)), NARROW_ROW);
    jobs.panel = GROUP_ROWS * in.row_bytes / 16;
    jobs.part = in.h_columns * NARROW_ROW / 16;
    jobs.added = added_to<TOKENS, HALVES>(in, shared, 0) + row * (TOKENS * 4);
    jobs.turned = turned_by<TOKENS>(row); /* and of row + 8 */
    jobs.column = lane % 4 * 2;
    return jobs;
}

/* B times h of all segments in a slice, job after job, to what is added to the rows of the groups that are of
 * the slice. */
template <int TOKENS, int HALVES>
static inline __device__ void multiply_half(const struct jobs &jobs, int half,
                                            const struct inside_shared *shared)
{
    enum { GROUPS = 2 / HALVES, COLUMNS = NARROW_ROW / 16 /* 16 bytes */ };
    const int n = of_all_lanes(shared->n_jobs[half]);
    const uint32_t added = jobs.added + half * (GROUP_ROWS * TOKENS * 4);
#pragma unroll 1
    for (int j = 0; j < n; j++) {
        const struct job job = job_of(of_all_lanes(shared->jobs[half][j]));
        if (job.begins) barrier_wait(shared_address(&shared->b_full[job.place]), job.turn);
        uint64_t b = jobs.b + job.slot * (GROUPS * jobs.panel);
        uint64_t h = jobs.h + job.eights * (GROUP * COLUMNS);
        float sum[GROUPS][SIXTEEN / 2] = {};
#pragma unroll
        for (int g = 0; g < GROUPS; g++) products_land(sum[g]);
        int tile = 0;
#pragma unroll 1
        do {
            products_begin();
#pragma unroll
            for (int p = 0; p < H_PARTS; p++)
#pragma unroll
                for (int g = 0; g < GROUPS; g++)
                    product_rows(sum[g], b + g * jobs.panel, h + p * jobs.part);
            products_commit();
            b += COLUMNS, h += H_PARTS * jobs.part;
        } while (++tile < job.tiles);
        const signed char *token = shared->token + job.first + jobs.column;
        uint32_t to[4];
#pragma unroll
        for (int e = 0; e < 4; e++) to[e] = added + (token[e / 2 * 8 + e % 2] ^ jobs.turned) * 4;
        products_wait<0>();
#pragma unroll
        for (int g = 0; g < GROUPS; g++) products_land(sum[g]);
        if (job.ends && worker() % WARP == 0)
            barrier_arrive(shared_address(&shared->b_empty[job.place]));
#pragma unroll
        for (int e = 0; e < 4; e++) {
            if (jobs.column + e / 2 * 8 + e % 2 >= job.n_tokens) continue;
#pragma unroll
            for (int g = 0; g < GROUPS; g++)
#pragma unroll
                for (int k = 0; k < 2; k++)
                    store_shared_float(to[e] + (g * GROUP_ROWS + k * 8) * (TOKENS * 4),
                                       sum[g][e / 2 * 4 + k * 2 + e % 2]);
        }
    }
}

/* What the block adds. False: some of h has not come for long; called again, it goes on. */
template <int TOKENS, int HALVES>
static inline __device__ bool multiply_inside(const struct lora_inside &in,
                                              struct inside_shared *shared)
{
    const int tiles = shared->share.tiles;
    const struct jobs jobs = jobs_of<TOKENS, HALVES>(in, shared);
    int asked = shared->asked;
    bool is_asked = false;
#pragma unroll 1
    for (int step = shared->step; step < tiles * HALVES; step++) {
        const int half = step / tiles, tile = step % tiles;
        if (tile >= shared->tiles[half]) continue;
        if (tile == 0) inside_sync(); /* h of the slice before has been multiplied */
        for (bool is_first = true;; is_first = false) {
            if (!is_asked && worker() == 0)
                wait_for_h<TOKENS, HALVES>(
                    in, half, tile, is_first ? first_of_h(half, tile, shared) : shared->missing,
                    shared);
            is_asked = false;
            barrier_wait(shared_address(&shared->h_full), asked++);
            if (take_h<TOKENS, HALVES>(in, half, tile, shared)) break;
            if (shared->is_late) {
                shared->step = step, shared->asked = asked;
                return false;
            }
        }
        const bool is_last = tile == shared->tiles[half] - 1;
        is_asked = !is_last || (half < HALVES - 1 && shared->tiles[half + 1] > 0);
        if (is_asked && worker() == 0)
            ask_for_h<TOKENS, HALVES>(in, half + is_last, is_last ? 0 : tile + 1, false, shared);
        if (!is_last) continue;
        shared_publish();
        inside_sync();
        multiply_half<TOKENS, HALVES>(jobs, half, shared);
    }
    return true;
}

/* What the fifth warp does in a block. */
template <int HALVES>
static inline __device__ void keep_inside(const struct lora_inside &in, int lane,
                                          struct inside_shared *shared)
{
    struct passage passages[HALVES];
    if (shared->share.tiles > 0) find_segments<HALVES>(in, lane, passages, shared);
    keep_exchange(in, lane, shared);
    if (shared->share.tiles > 0) ask_for_b<HALVES>(in, passages, shared);
}

/* What the others do. `ready` is told when what add_inside() reads is there. */
template <int TOKENS, int HALVES>
static inline __device__ void work_inside(const struct lora_inside &in,
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
            inside_sync(); /* that unit has been read */
        }
        if (shared->share.tiles == 0) return;
        shared_publish();
        if (stride > 1) barrier_arrive(shared_address(&shared->made));
        barrier_wait(shared_address(&shared->segments_known), 0);
        wait_for_stages(shared);
        barrier_wait(shared_address(&shared->turn_known), 0);
        if (multiply_inside<TOKENS, HALVES>(in, shared)) break;
        /* Who is to make it may wait for a multiprocessor that others' kernels hold: make all of it,
         * in the ring, which is free then, and begin anew. */
        barrier_wait(shared_address(&shared->idle), 0);
        unit = 0, stride = 1;
    }
    barrier_arrive(shared_address(&shared->ready));
}

/* sum [64, TOKENS] of a warpgroup += what has been made for its rows. */
template <int TOKENS, int HALVES>
static inline __device__ void add_inside(float (&sum)[TOKENS / 2], const struct lora_inside &in,
                                         const struct inside_shared *shared)
{
    const int group = threadIdx.x / 128, lane = threadIdx.x % WARP;
    const int row = threadIdx.x % 128 / WARP * SIXTEEN + lane / 4;
    const uint32_t added = added_to<TOKENS, HALVES>(in, shared, group) + row * (TOKENS * 4);
    const int turned = turned_by<TOKENS>(row); /* and of row + 8 */
#pragma unroll
    for (int i = 0; i < TOKENS / 8; i++) {
        const int t = i * 8 + lane % 4 * 2;
        const uint32_t adds = shared->adds[group % HALVES][i / 4] >> t % WARP;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const uint2 two = load_shared_pair(added + k * 8 * (TOKENS * 4) + (t ^ turned) * 4);
            if (adds & 1) sum[4 * i + 2 * k] += __uint_as_float(two.x);
            if (adds & 2) sum[4 * i + 2 * k + 1] += __uint_as_float(two.y);
        }
    }
}

#endif
#endif
