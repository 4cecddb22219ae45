// Attention of one query of each sequence over its KV cache, in parts of the keys (Flash-Decoding, Dao et al. 2023): a block has a sequence,
// a key head, up to sixteen of the query heads that share it, which are the rows of its products, and a part of the keys, a tile at a time.
// The last block of such heads that ends joins the parts, always in their order: which block that is changes no bit, and adds the heads'
// sinks. A warp has RUNS runs of eight columns of the output, at most.

#define THREADS 256
#define WARPS (THREADS / 32)
#define HEADS 16      // query heads of a block, at most
#define KEYS 64       // of a tile, at most
#define TICKETS 4096  // where blocks of the same heads count who is the last

struct Decode {
    int share, own;  // query heads of a key head, and of a block
    int dim, value_dim;  // columns of a head
    int keys;                  // of a tile
    int groups;                // runs of query heads of a key head, each with blocks of its own
    int tiles;                 // of a part
    int window;                // 0 is none
    long long apart;           // elements from a sequence's cache to the next one's
    float scale, softcap;
};

// Which cache a sequence has, and how many keys are in it; the newest one is behind them.
struct Sequence {
    u32 place, cached;
};

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// Rows of the cache from `from` on into shared memory, `dim` columns; rows behind it are zero.
__device__ __forceinline__ void load_keys(bf16* to, const View& cache, int from, int cached, int dim, const Decode& s) {
    int pieces = dim / 8;
    for (int i = threadIdx.x; i < s.keys * pieces; i += THREADS) {
        int n = i / pieces, c = i % pieces * 8;
        bool inside = from + n < cached;
        copy_async(shared_address(to + n * (dim + 8) + c), row(cache, inside ? from + n : 0) + c, inside);
    }
    commit_copies();
}

// The newest row, into its place in shared memory and in the cache.
__device__ __forceinline__ void add_newest(bf16* to, const View& cache, const bf16* newest, int from, int cached, int dim, bool stores) {
    int c = threadIdx.x * 8;
    if (c >= dim) return;
    uint4 values = *(const uint4*)(newest + c);
    *(uint4*)(to + (cached - from) * (dim + 8) + c) = values;
    if (stores) *(uint4*)(row(cache, cached) + c) = values;
}

// Where a lane's row of a left side of 16 rows and columns lies, whose rows are `ld` apart.
__device__ __forceinline__ u32 left(const bf16* of, int ld) {
    int lane = threadIdx.x % 32;
    return shared_address(of + lane % 16 * ld + lane / 16 * 8);
}

// The outputs of all parts, each of them a softmax over its own keys, become one. `sinks` are those of the heads, logits that join the sum.
__device__ __forceinline__ void join(bf16* out, const float* outputs, const float2* numbers, const bf16* sinks, int parts, int heads,
                                     const Decode& s) {
    for (int at = threadIdx.x * 4; at < heads * s.value_dim; at += THREADS * 4) {
        const float2* of = numbers + at / s.value_dim;
        // A sink is a part without an output.
        float top = sinks ? to_float(sinks[at / s.value_dim]) : -1e30f, all = sinks ? 1.f : 0.f;
        float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
        for (int p = 0; p < parts; p++) {
            float2 number = __ldcg(of + p * s.own);
            float4 part = __ldcg((const float4*)(outputs + (long long)p * s.own * s.value_dim + at));
            float higher = fmaxf(top, number.x), by = __expf(number.x - higher), shrink = __expf(top - higher);
            top = higher;
            all = all * shrink + by * number.y;
            o.x = o.x * shrink + by * part.x, o.y = o.y * shrink + by * part.y;
            o.z = o.z * shrink + by * part.z, o.w = o.w * shrink + by * part.w;
        }
        float by = 1.f / all;
        *(uint2*)(out + at) = make_uint2(pack(o.x * by, o.y * by), pack(o.z * by, o.w * by));
    }
}

// `q`, `k` and `v` have a row of the newest token of each sequence; `keys` and `values` are those of the first cache.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_decode(View q, View k, View v, View keys, View values, View out, const Sequence* sequences, float* scratch, const bf16* sinks,
                     Decode s) {
    extern __shared__ uint4 memory[];
    __shared__ float scores[HEADS][KEYS + 4], shrinks[HEADS];
    __shared__ __align__(16) bf16 weights[HEADS][KEYS + 8];
    __shared__ bool last;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, ld = s.dim + 8, value_ld = s.value_dim + 8;
    int sequence = blockIdx.z / s.groups, run = blockIdx.z % s.groups;
    Sequence own = sequences[sequence];
    int cached = own.cached, first = s.window > 0 ? max(cached + 1 - s.window, 0) : 0, part = s.tiles * s.keys;
    // The longest sequence has as many parts as there are blocks.
    int parts = (cached + 1 - first + part - 1) / part;
    if (blockIdx.x >= parts) return;
    int head = blockIdx.y * s.share + run * s.own, heads = min(s.own, s.share - run * s.own);
    bf16 *key_tile = (bf16*)memory, *value_tile = key_tile + s.keys * ld, *queries = value_tile + s.keys * value_ld;
    // The key head's rows.
    const bf16 *query = row(q, sequence), *key_row = row(k, sequence) + blockIdx.y * s.dim;
    const bf16* value_row = row(v, sequence) + blockIdx.y * s.value_dim;
    keys.at += own.place * s.apart + blockIdx.y * s.dim, values.at += own.place * s.apart + blockIdx.y * s.value_dim;
    int from = first + blockIdx.x * part, end = min(from + part, cached + 1);
    float max[HEADS / WARPS], sum[HEADS / WARPS], o[RUNS][4] = {};
#pragma unroll
    for (int i = 0; i < HEADS / WARPS; i++) max[i] = -1e30f, sum[i] = 0.f;
    for (int key = from; key < end; key += s.keys) {
        // What is cached was there before this pass: of the kernels before come the newest rows alone.
        load_keys(key_tile, keys, key, cached, s.dim, s);
        load_keys(value_tile, values, key, cached, s.value_dim, s);
        if (key == from) {
            after_previous();
            for (int i = threadIdx.x * 8; i < HEADS * s.dim; i += THREADS * 8) {
                int h = i / s.dim, c = i % s.dim;
                *(uint4*)(queries + h * ld + c) = h < heads ? *(const uint4*)(query + (head + h) * s.dim + c) : make_uint4(0, 0, 0, 0);
            }
        }
        copies_done<1>();
        if (cached < key + s.keys) {
            copies_done<0>();
            __syncthreads();
            add_newest(key_tile, keys, key_row, key, cached, s.dim, run == 0);
            add_newest(value_tile, values, value_row, key, cached, s.value_dim, run == 0);
        }
        __syncthreads();
        // A warp has eight keys.
        if (warp * 8 < s.keys) {
            float c[4] = {};
            u32 mine = left(queries, ld), of = shared_address(key_tile + (warp * 8 + lane % 8) * ld + lane / 8 * 8);
            for (int i = 0; i < s.dim; i += 32) {
                u32 a[4], b[4];
                ldmatrix(a, mine + i * 2);
                // Of 32 columns, of which the last may be behind a row: then they are not read.
                ldmatrix(b, of + i * 2);
                mma(c, a, b);
                if (i + 16 >= s.dim) break;
                ldmatrix(a, mine + (i + 16) * 2);
                mma(c, a, b + 2);
            }
            float* to = &scores[lane / 4][warp * 8 + lane % 4 * 2];
            *(float2*)to = make_float2(c[0], c[1]);
            *(float2*)(to + 8 * (KEYS + 4)) = make_float2(c[2], c[3]);
        }
        __syncthreads();
        // A warp has a head, a lane two keys.
#pragma unroll
        for (int i = 0; i < HEADS / WARPS; i++) {
            int h = warp + i * WARPS;
            if (h >= heads) break;
            float score[KEYS / 32], top = max[i], all = 0.f;
#pragma unroll
            for (int j = 0; j < KEYS / 32; j++) {
                int n = lane + j * 32;
                score[j] = n < s.keys ? scores[h][n] * s.scale : 0.f;
                if (s.softcap > 0.f) score[j] = s.softcap * (1.f - 2.f / (1.f + __expf(2.f * score[j] / s.softcap)));
                if (n >= s.keys || key + n >= end) score[j] = -1e30f;
                top = fmaxf(top, score[j]);
            }
            top = warp_max(top);
            float shrink = __expf(max[i] - top);
#pragma unroll
            for (int j = 0; j < KEYS / 32; j++) {
                float weight = __expf(score[j] - top);
                all += weight;
                weights[h][lane + j * 32] = to_bf16(weight);
            }
            sum[i] = sum[i] * shrink + warp_sum(all);
            max[i] = top;
            if (lane == 0) shrinks[h] = shrink;
        }
        copies_done<0>();
        __syncthreads();
        // A warp has every eighth run of eight columns.
        u32 a[KEYS / 16][4];
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++)
            if (i * 16 < s.keys) ldmatrix(a[i], left(&weights[0][i * 16], KEYS + 8));
        float shrink[2] = {shrinks[lane / 4], shrinks[lane / 4 + 8]};
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
            int c = (warp + r * WARPS) * 8;
            if (c >= s.value_dim) break;
#pragma unroll
            for (int j = 0; j < 4; j++) o[r][j] *= shrink[j / 2];
#pragma unroll
            for (int i = 0; i < KEYS / 32; i++) {
                if (i * 32 >= s.keys) break;
                u32 b[4];
                ldmatrix_transposed(b, shared_address(value_tile + (i * 32 + lane) * value_ld + c));
                mma(o[r], a[2 * i], b);
                mma(o[r], a[2 * i + 1], b + 2);
            }
        }
        __syncthreads();
    }
    // What this part gives, behind the tickets: outputs of all parts, then their maxima and sums.
    int group = blockIdx.y * gridDim.z + blockIdx.z;
    int room = gridDim.x;
    u32* tickets = (u32*)scratch;
    float* outputs = scratch + TICKETS + (long long)group * room * s.own * (s.value_dim + 4);
    float2* numbers = (float2*)(outputs + (long long)room * s.own * s.value_dim);
#pragma unroll
    for (int i = 0; i < HEADS / WARPS; i++)
        if (warp + i * WARPS < heads && lane == 0) numbers[blockIdx.x * s.own + warp + i * WARPS] = make_float2(max[i], sum[i]);
#pragma unroll
    for (int r = 0; r < RUNS; r++) {
        int c = (warp + r * WARPS) * 8 + lane % 4 * 2;
        if (c >= s.value_dim) break;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int h = lane / 4 + half * 8;
            if (h < heads) *(float2*)(outputs + (blockIdx.x * s.own + h) * s.value_dim + c) = make_float2(o[r][2 * half], o[r][2 * half + 1]);
        }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(tickets + group, 1) == parts - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) tickets[group] = 0;
    join(row(out, sequence) + head * s.value_dim, outputs, numbers, sinks ? sinks + head : sinks, parts, heads, s);
}
