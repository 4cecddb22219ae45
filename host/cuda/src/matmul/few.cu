// Matmuls of few rows, Y = X Wᵀ, which like those of one take the time in which W is read. A block has sixteen rows of W, which are the left
// side of the tensor cores' products, and eight rows of X are a right side. Its warps share the columns: a lane reads 16 bytes of two rows
// of W at a time, AHEAD times before it multiplies. What a sum is of has no order, so that these eight columns go into two products as they
// lie: in each, a lane has four of them, of W and of X alike. Sums of warps are added in their order.

#define THREADS 256
#define WARPS (THREADS / 32)
#define ROWS 16
#define AHEAD 4
#define STEP 32  // columns that a warp reads at once

// Leaves the first `count` of eight values; the others are zero.
__device__ __forceinline__ void cut(uint4& v, int count) {
    u32* words = &v.x;
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = count >= 2 * i + 2 ? words[i] : count == 2 * i + 1 ? words[i] & 0xffffu : 0;
}

// Weights are read once: kept, they would push X out of the cache.
__device__ __forceinline__ uint4 load_once(const bf16* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Adds the products of AHEAD times STEP columns. Those of a WHOLE step are all there: then no load waits for another. What lies behind a
// row of k is anything, not numbers alone.
template <int TILES, bool WHOLE>
__device__ __forceinline__ void step(float (&c)[TILES][4], const bf16* low, const bf16* high, const bf16* const (&rows)[TILES], int from, int k) {
    uint4 a[AHEAD][2], b[AHEAD][TILES], none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        int at = from + s * STEP;
        bool inside = WHOLE || at < k;
        a[s][0] = inside ? load_once(low + at) : none, a[s][1] = inside ? load_once(high + at) : none;
#pragma unroll
        for (int i = 0; i < TILES; i++) b[s][i] = inside ? *(const uint4*)(rows[i] + at) : none;
    }
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        int count = k - from - s * STEP;
        if (!WHOLE && count > 0 && count < 8) {
            cut(a[s][0], count), cut(a[s][1], count);
#pragma unroll
            for (int i = 0; i < TILES; i++) cut(b[s][i], count);
        }
        u32 left[2][4] = {{a[s][0].x, a[s][1].x, a[s][0].y, a[s][1].y}, {a[s][0].z, a[s][1].z, a[s][0].w, a[s][1].w}};
#pragma unroll
        for (int i = 0; i < TILES; i++) {
            u32 right[2][2] = {{b[s][i].x, b[s][i].y}, {b[s][i].z, b[s][i].w}};
            mma(c[i], left[0], right[0]);
            mma(c[i], left[1], right[1]);
        }
    }
}

// The products of TILES times eight rows of X with two times eight rows of W, of which a lane's are `low` and `high`; in `sums` by row of X,
// then by row of W, `low` ones first.
template <int TILES>
__device__ __forceinline__ void products(float (*sums)[ROWS], const bf16* low, const bf16* high, const View& x, int m, int k) {
    __shared__ float parts[WARPS][TILES * 8][ROWS + 1];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const bf16* rows[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) rows[i] = row(x, min(i * 8 + g, m - 1));
    float c[TILES][4] = {};
    int from = warp * STEP * AHEAD;
    for (; from + STEP * AHEAD <= k; from += WARPS * STEP * AHEAD) step<TILES, true>(c, low, high, rows, from + t * 8, k);
    if (from < k) step<TILES, false>(c, low, high, rows, from + t * 8, k);
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) parts[warp][i * 8 + t * 2 + j % 2][g + j / 2 * 8] = c[i][j];
    __syncthreads();
    for (int i = threadIdx.x; i < m * ROWS; i += THREADS) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += parts[w][i / ROWS][i % ROWS];
        sums[i / ROWS][i % ROWS] = sum;
    }
    __syncthreads();
}

__device__ __forceinline__ void store(bf16* y, float x) { *y = to_bf16(x); }
__device__ __forceinline__ void store(float* y, float x) { *y = x; }

template <int TILES, typename T>
__device__ __forceinline__ void few_of(const View& x, const View& w, const View& c, const bf16* bias, T* y, long long ld, int m, int n, int k) {
    __shared__ float sums[TILES * 8][ROWS];
    int first = blockIdx.x * ROWS, g = threadIdx.x % 32 / 4;
    products<TILES>(sums, row(w, min(first + g, n - 1)), row(w, min(first + g + 8, n - 1)), x, m, k);
    for (int i = threadIdx.x; i < m * ROWS; i += THREADS) {
        int r = i / ROWS, at = first + i % ROWS;
        if (at >= n) continue;
        float all = sums[r][i % ROWS];
        if (bias) all += to_float(bias[at]);
        if (c.at) all += to_float(row(c, r)[at]);
        store(y + r * ld + at, all);
    }
}

template <int TILES>
__device__ __forceinline__ void gated_of(const View& x, const View& w, const View& h, int m, int width, int k, int activation, float limit) {
    __shared__ float sums[TILES * 8][ROWS];
    int first = blockIdx.x * 8, g = threadIdx.x % 32 / 4, own = min(first + g, width - 1);
    products<TILES>(sums, row(w, own), row(w, width + own), x, m, k);
    for (int i = threadIdx.x; i < m * 8; i += THREADS) {
        int r = i / 8, at = i % 8;
        if (first + at < width) store(row(h, r) + first + at, activate(sums[r][at], activation, limit).value * sums[r][at + 8]);
    }
}

// Y = X Wᵀ, plus a bias and C where they are given, for at most TILES times eight rows; W is [n, k]. In bf16, in f32; and
// H = act(X Gᵀ) (X Uᵀ): W is [2 width, k], gate and then up.
#define KERNELS(ROWS_OF_X, TILES)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                            \
        few_##ROWS_OF_X(View x, View w, View c, const bf16* bias, bf16* y, long long ld, int m, int n, int k) {                         \
        after_previous();                                                                                                               \
        few_of<TILES>(x, w, c, bias, y, ld, m, n, k);                                                                                   \
    }                                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                            \
        few_wide_##ROWS_OF_X(View x, View w, View c, const bf16* bias, float* y, long long ld, int m, int n, int k) {                   \
        after_previous();                                                                                                               \
        few_of<TILES>(x, w, c, bias, y, ld, m, n, k);                                                                                   \
    }                                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                                            \
        few_gated_##ROWS_OF_X(View x, View w, View h, int m, int width, int k, int activation, float limit) {                           \
        after_previous();                                                                                                               \
        gated_of<TILES>(x, w, h, m, width, k, activation, limit);                                                                       \
    }

KERNELS(8, 1)
KERNELS(16, 2)
KERNELS(32, 4)
