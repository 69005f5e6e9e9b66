/* Rotary positions, and the step's keys and values into the cache, in one pass over qkv. A token's heads are
 * shared out over several blocks, each of which makes the token's angles once: of few tokens it is bound by
 * latency. For rows of one token attention_decode.cu does it, where it comes next. */
#include "kernels/cuda/rope.cuh"

/* ---- kernels ------------------------------------------------------------------------------ */

enum { ROPE_BLOCK = 128 };

struct rope_args {
    struct turn turn;
    const int32_t *position, *row; /* [T] */
    const int32_t *kv_len;         /* [Q]: token t is the only one of row t; NULL: it need not be */
    const int32_t *block_table;    /* [Q, max_blocks] */
    int max_blocks, H, G, d;
    int heads_a_block;
};

/* Turn heads h < H + G of token t in place, and copy heads h >= H to the cache:
 *   K[block][g][position % KV_BLOCK][:] = head H + g, V the same of head H + G + g
 * A work item is elements [i, i + WIDTH) and [i + d / 2, i + d / 2 + WIDTH) of a head.
 *
 *   qkv [T, H + 2 G, d] X, and what is added to it    k, v [., G, KV_BLOCK, d] C
 *   grid (heads / heads_a_block, T)    block ROPE_BLOCK    shared d floats */
template <typename X, typename C, int WIDTH>
static __global__ void rope_kernel(X *qkv, C *k, C *v, const struct rope_args args)
{
    extern __shared__ float shared[];
    grid_release();
    const int H = args.H, G = args.G, d = args.d, half = d / 2;
    float *cosine = shared, *sine = shared + half; /* [d / 2] each */
    const int t = blockIdx.y;
    if (!args.kv_len) grid_wait(); /* else what was uploaded says where the token is */
    const int position = args.kv_len ? args.kv_len[t] - 1 : args.position[t];
    const int row = args.kv_len ? t : args.row[t];
    const int32_t block = args.block_table[(size_t)row * args.max_blocks + position / KV_BLOCK];

    make_angles(cosine, sine, args.turn, position, half);
    const struct addend addend = addend_of(args.turn.addend, t);
    grid_wait();
    __syncthreads();

    const bool adds = is_added(addend);
    const int first = blockIdx.x * args.heads_a_block;
    const int n_heads = min_int(args.heads_a_block, H + 2 * G - first);
    const int items = half / WIDTH; /* of a head */
    for (int item = threadIdx.x; item < n_heads * items; item += ROPE_BLOCK) {
        const int h = first + item / items, i = item % items * WIDTH;
        const size_t at = ((size_t)t * (H + 2 * G) + h) * d + i;
        X *head = qkv + at - i;
        float a[WIDTH], b[WIDTH];
        if constexpr (WIDTH == GROUP) {
            load_halves(a, b, head + i, addend, adds, at, half);
        } else {
            a[0] = widen(head[i]), b[0] = widen(head[i + half]);
            if (adds) a[0] = add_one<X>(a[0], addend, at);
            if (adds) b[0] = add_one<X>(b[0], addend, at + half);
        }
        const bool turns = h < H + G && args.turn.frequency;
        if (turns) turn_pairs<X>(a, b, cosine + i, sine + i);
        if (turns || adds) {
            if constexpr (WIDTH == GROUP) {
                store_group(head + i, a);
                store_group(head + i + half, b);
            } else {
                head[i] = narrow<X>(a[0]), head[i + half] = narrow<X>(b[0]);
            }
        }
        if (h < H) continue;
        const int g = (h - H) % G;
        C *slot =
            (h < H + G ? k : v) + (((size_t)block * G + g) * KV_BLOCK + position % KV_BLOCK) * d;
        if constexpr (WIDTH == GROUP) {
            store_group(slot + i, a);
            store_group(slot + i + half, b);
        } else {
            slot[i] = narrow<C>(a[0]), slot[i + half] = narrow<C>(b[0]);
        }
    }
}

/* ---- launchers ---------------------------------------------------------------------------- */

static void start(struct cuda_device *cuda, const struct held_rope *rope)
{
    const struct batch_view *batch = &rope->batch;
    const struct kv_view *kv = &rope->kv;
    const int H = rope->heads.H, G = rope->heads.G, d = rope->heads.d;
    const bool aligned =
        d % (2 * GROUP) == 0 && is_aligned(rope->qkv) && is_aligned(kv->k) && is_aligned(kv->v);
    struct rope_args args = {{true, rope->rope.frequency, rope->rope.amplitude, rope->addend},
                             batch->position,
                             batch->row,
                             has_single_tokens(batch) ? batch->kv_len : NULL,
                             kv->block_table,
                             kv->max_blocks,
                             H,
                             G,
                             d,
                             1};
    args.heads_a_block = max_int(1, ROPE_BLOCK / (d / 2 / (aligned ? GROUP : 1)));
    const dim3 grid(ceil_div(H + 2 * G, args.heads_a_block), batch->T);
    with_activation(rope->dtype, [&](auto x_type) {
        with_activation(kv->dtype, [&](auto c_type) {
            using X = decltype(x_type);
            using C = decltype(c_type);
            const auto kernel = aligned ? rope_kernel<X, C, GROUP> : rope_kernel<X, C, 1>;
            cuda_launch(cuda, "rope", kernel, grid, ROPE_BLOCK, d * sizeof(float), 1,
                        (X *)rope->qkv, (C *)kv->k, (C *)kv->v, args);
        });
    });
}

void cuda_rope(struct device *dev, void *qkv, const struct rope_view *rope,
               const struct kv_view *kv, const struct batch_view *batch, const struct heads *heads,
               enum dtype dtype)
{
    struct held_rope held = {qkv, dtype, *rope, *kv, *batch, *heads, {}};
    struct cuda_device *cuda = cuda_begin_adding(dev, qkv, &held.addend);
    if (!cuda || batch->T == 0) return;
    assert(heads->d % 2 == 0 && heads->d <= 4096 && batch->T <= 65535);

    if (has_single_tokens(batch) && !cuda->is_lent)
        cuda->held_rope = held;
    else
        start(cuda, &held);
}

void rope_make_held(struct cuda_device *cuda)
{
    const struct held_rope held = cuda->held_rope;

    cuda->held_rope.qkv = NULL;
    start(cuda, &held);
}
