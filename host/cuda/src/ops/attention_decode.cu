// Attention of one query over a KV cache, in parts of the keys (Flash-Decoding, Dao et al. 2023): a block has a key head, query heads that
// share it, and a part of the keys, a tile of 32 at a time. The last block of such heads that ends joins the parts, always in their
// order: which block that is changes no bit.

#define KEYS 32  // of a tile: one a lane
#define THREADS 256
#define WARPS (THREADS / 32)
#define HEADS 16      // query heads of a block, at most
#define ITEMS 4       // pieces of four columns of the output that a thread has, at most
#define TICKETS 1024  // where blocks of the same heads count who is the last

struct Decode {
    int share, own;  // query heads of a key head, and of a block
    int dim;
    int first, cached;  // the first key that is seen, and keys in the cache; the newest one is behind them
    int tiles;          // of a part
    float scale, softcap;
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// Rows [from, from + KEYS) of the cache into shared memory; rows behind it are zero.
__device__ __forceinline__ void load_keys(bf16* to, const View& cache, int from, const Decode& s) {
    int pieces = s.dim / 8;
    for (int i = threadIdx.x; i < KEYS * pieces; i += THREADS) {
        int key = from + i / pieces, c = i % pieces * 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to + i / pieces * (s.dim + 8) + c)),
                     "l"(row(cache, key < s.cached ? key : 0) + c), "r"(key < s.cached ? 16 : 0));
    }
    asm volatile("cp.async.commit_group;");
}

// The newest row, into its place in shared memory and in the cache.
__device__ __forceinline__ void add_newest(bf16* to, const View& cache, const bf16* newest, int from, const Decode& s) {
    int c = threadIdx.x * 8;
    if (c >= s.dim) return;
    uint4 values = *(const uint4*)(newest + c);
    *(uint4*)(to + (s.cached - from) * (s.dim + 8) + c) = values;
    if (blockIdx.z == 0) *(uint4*)(row(cache, s.cached) + c) = values;
}

// The outputs of all parts, each of them a softmax over its own keys, become one.
__device__ __forceinline__ void join(bf16* out, const float* outputs, const float2* numbers, int parts, int heads, const Decode& s) {
    for (int at = threadIdx.x * 4; at < heads * s.dim; at += THREADS * 4) {
        const float2* of = numbers + at / s.dim;
        float top = -1e30f, all = 0.f;
        float4 o = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 8
        for (int p = 0; p < parts; p++) {
            float2 number = __ldcg(of + p * s.own);
            float4 part = __ldcg((const float4*)(outputs + (long long)p * s.own * s.dim + at));
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

// `q`, `k` and `v` are the newest token's.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_decode(const bf16* q, const bf16* k, const bf16* v, View keys, View values, bf16* out, float* scratch, Decode s) {
    extern __shared__ uint4 memory[];
    __shared__ float weights[HEADS][KEYS], shrinks[HEADS];
    __shared__ bool last;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, parts = gridDim.x;
    int head = blockIdx.y * s.share + blockIdx.z * s.own, heads = min(s.own, s.share - (int)blockIdx.z * s.own);
    bf16 *key_tile = (bf16*)memory, *value_tile = key_tile + KEYS * (s.dim + 8);
    float* queries = (float*)(value_tile + KEYS * (s.dim + 8));
    // The key head's rows.
    k += blockIdx.y * s.dim, v += blockIdx.y * s.dim;
    keys.at += blockIdx.y * s.dim, values.at += blockIdx.y * s.dim;
    int from = s.first + blockIdx.x * s.tiles * KEYS, end = min(from + s.tiles * KEYS, s.cached + 1);
    float max[HEADS / WARPS], sum[HEADS / WARPS], o[ITEMS][4] = {};
#pragma unroll
    for (int i = 0; i < HEADS / WARPS; i++) max[i] = -1e30f, sum[i] = 0.f;
    for (int key = from; key < end; key += KEYS) {
        // What is cached was there before this pass: of the kernels before come the newest rows alone.
        load_keys(key_tile, keys, key, s);
        load_keys(value_tile, values, key, s);
        if (key == from) {
            after_previous();
            for (int i = threadIdx.x * 8; i < heads * s.dim; i += THREADS * 8) {
                Eight own = load8(q + head * s.dim + i);
#pragma unroll
                for (int j = 0; j < 8; j++) queries[i + j] = own.v[j] * s.scale;
            }
        }
        asm volatile("cp.async.wait_group 1;");
        if (s.cached < key + KEYS) {
            asm volatile("cp.async.wait_group 0;");
            __syncthreads();
            add_newest(key_tile, keys, k, key, s);
            add_newest(value_tile, values, v, key, s);
        }
        __syncthreads();
        // A warp has a head, a lane a key.
#pragma unroll
        for (int i = 0; i < HEADS / WARPS; i++) {
            int h = warp + i * WARPS;
            if (h >= heads) break;
            float score = 0.f;
#pragma unroll 4
            for (int c = 0; c < s.dim; c += 8) {
                Eight mine = load8(key_tile + lane * (s.dim + 8) + c);
                const float4* of = (const float4*)(queries + h * s.dim + c);
                float4 a = of[0], b = of[1];
                score += mine.v[0] * a.x + mine.v[1] * a.y + mine.v[2] * a.z + mine.v[3] * a.w;
                score += mine.v[4] * b.x + mine.v[5] * b.y + mine.v[6] * b.z + mine.v[7] * b.w;
            }
            if (s.softcap > 0.f) score = s.softcap * (1.f - 2.f / (1.f + __expf(2.f * score / s.softcap)));
            if (key + lane >= end) score = -1e30f;
            float top = fmaxf(max[i], warp_max(score));
            float weight = key + lane < end ? __expf(score - top) : 0.f, shrink = __expf(max[i] - top);
            sum[i] = sum[i] * shrink + warp_sum(weight);
            max[i] = top;
            weights[h][lane] = weight;
            if (lane == 0) shrinks[h] = shrink;
        }
        asm volatile("cp.async.wait_group 0;");
        __syncthreads();
        // A thread has four columns of a head.
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int at = (threadIdx.x + i * THREADS) * 4, h = at / s.dim, c = at % s.dim;
            if (h >= heads) break;
            float shrink = shrinks[h];
#pragma unroll
            for (int j = 0; j < 4; j++) o[i][j] *= shrink;
#pragma unroll 8
            for (int n = 0; n < KEYS; n++) {
                uint2 raw = *(const uint2*)(value_tile + n * (s.dim + 8) + c);
                float weight = weights[h][n];
                o[i][0] += weight * __uint_as_float(raw.x << 16);
                o[i][1] += weight * __uint_as_float(raw.x & 0xffff0000u);
                o[i][2] += weight * __uint_as_float(raw.y << 16);
                o[i][3] += weight * __uint_as_float(raw.y & 0xffff0000u);
            }
        }
        __syncthreads();
    }
    // What this part gives, behind the tickets: outputs of all parts, then their maxima and sums.
    int group = blockIdx.y * gridDim.z + blockIdx.z;
    u32* tickets = (u32*)scratch;
    float* outputs = scratch + TICKETS + (long long)group * parts * s.own * (s.dim + 4);
    float2* numbers = (float2*)(outputs + (long long)parts * s.own * s.dim);
#pragma unroll
    for (int i = 0; i < HEADS / WARPS; i++)
        if (warp + i * WARPS < heads && lane == 0) numbers[blockIdx.x * s.own + warp + i * WARPS] = make_float2(max[i], sum[i]);
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int at = (threadIdx.x + i * THREADS) * 4;
        if (at < heads * s.dim)
            *(float4*)(outputs + blockIdx.x * s.own * s.dim + at) = make_float4(o[i][0], o[i][1], o[i][2], o[i][3]);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(tickets + group, 1) == parts - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) tickets[group] = 0;
    join(out + head * s.dim, outputs, numbers, parts, heads, s);
}
