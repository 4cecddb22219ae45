// Skinny matmuls: Y = X Wᵀ for few rows of X, which like those of one take the time in which W is read. A block has sixteen rows of W, or twice as many,
// which are left sides of the tensor cores' products, and eight rows of X are a right side. Its warps share the columns: a lane reads 16
// bytes of each of its rows AHEAD times before it multiplies. What a sum is of has no order, so that these eight columns go into two
// products as they lie: in each, a lane has four of them, of W and of X alike. Sums of warps are added in their order. The more rows of W a
// block has, the less often X is read.

#define THREADS 256
#define WARPS (THREADS / 32)
#define AHEAD 4
#define STEP 32  // columns that a warp reads at once

// Adds the products of AHEAD times STEP columns. Those of a WHOLE step are all there: then no load waits for another. What lies behind a
// row of k is anything, not numbers alone.
template <int LEFTS, int TILES, bool WHOLE>
__device__ __forceinline__ void step(float (&c)[LEFTS][TILES][4], const bf16* const (&w)[LEFTS][2], const bf16* const (&x)[TILES], int from, int k) {
    uint4 a[AHEAD][LEFTS][2], b[AHEAD][TILES], none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        int at = from + s * STEP;
        bool inside = WHOLE || at < k;
#pragma unroll
        for (int l = 0; l < LEFTS; l++)
#pragma unroll
            for (int h = 0; h < 2; h++) a[s][l][h] = inside ? load_once(w[l][h] + at) : none;
#pragma unroll
        for (int i = 0; i < TILES; i++) b[s][i] = inside ? *(const uint4*)(x[i] + at) : none;
    }
#pragma unroll
    for (int s = 0; s < AHEAD; s++) {
        int count = k - from - s * STEP;
        if (!WHOLE && count > 0 && count < 8) {
#pragma unroll
            for (int l = 0; l < LEFTS; l++) cut(a[s][l][0], count), cut(a[s][l][1], count);
#pragma unroll
            for (int i = 0; i < TILES; i++) cut(b[s][i], count);
        }
#pragma unroll
        for (int l = 0; l < LEFTS; l++) {
            uint4 low = a[s][l][0], high = a[s][l][1];
            u32 left[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
#pragma unroll
            for (int i = 0; i < TILES; i++) {
                u32 right[2][2] = {{b[s][i].x, b[s][i].y}, {b[s][i].z, b[s][i].w}};
                mma(c[l][i], left[0], right[0]);
                mma(c[l][i], left[1], right[1]);
            }
        }
    }
}

// The products of TILES times eight rows of X with LEFTS times sixteen rows of W, of which a lane reads `w`; in `sums` by row of X, then by
// row of W: eight of the first of a pair, eight of the second, then those of the next pair.
template <int LEFTS, int TILES>
__device__ __forceinline__ void products(float (*sums)[LEFTS * 16], const bf16* const (&w)[LEFTS][2], const View& x, int m, int k) {
    __shared__ float parts[WARPS][TILES * 8][LEFTS * 16 + 1];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const bf16* rows[TILES];
#pragma unroll
    for (int i = 0; i < TILES; i++) rows[i] = row(x, min(i * 8 + g, m - 1));
    float c[LEFTS][TILES][4] = {};
    int from = warp * STEP * AHEAD;
    for (; from + STEP * AHEAD <= k; from += WARPS * STEP * AHEAD) step<LEFTS, TILES, true>(c, w, rows, from + t * 8, k);
    if (from < k) step<LEFTS, TILES, false>(c, w, rows, from + t * 8, k);
#pragma unroll
    for (int l = 0; l < LEFTS; l++)
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) parts[warp][i * 8 + t * 2 + j % 2][l * 16 + j / 2 * 8 + g] = c[l][i][j];
    __syncthreads();
    for (int i = threadIdx.x; i < m * LEFTS * 16; i += THREADS) {
        float sum = 0.f;
#pragma unroll
        for (int p = 0; p < WARPS; p++) sum += parts[p][i / (LEFTS * 16)][i % (LEFTS * 16)];
        sums[i / (LEFTS * 16)][i % (LEFTS * 16)] = sum;
    }
    __syncthreads();
}

__device__ __forceinline__ void store(bf16* y, float x) { *y = to_bf16(x); }
__device__ __forceinline__ void store(float* y, float x) { *y = x; }

template <int LEFTS, int TILES, typename T>
__device__ __forceinline__ void skinny_of(const View& x, const View& w, const View& c, const bf16* bias, T* y, long long ld, int m, int n, int k) {
    constexpr int ROWS = LEFTS * 16;
    __shared__ float sums[TILES * 8][ROWS];
    int first = blockIdx.x * ROWS, g = threadIdx.x % 32 / 4;
    const bf16* rows[LEFTS][2];
#pragma unroll
    for (int i = 0; i < LEFTS * 2; i++) rows[i / 2][i % 2] = row(w, min(first + i * 8 + g, n - 1));
    products<LEFTS, TILES>(sums, rows, x, m, k);
    for (int i = threadIdx.x; i < m * ROWS; i += THREADS) {
        int r = i / ROWS, at = first + i % ROWS;
        if (at >= n) continue;
        float all = sums[r][i % ROWS];
        if (bias) all += to_float(bias[at]);
        if (c.at) all += to_float(row(c, r)[at]);
        store(y + r * ld + at, all);
    }
}

template <int LEFTS, int TILES>
__device__ __forceinline__ void gated_of(const View& x, const View& w, const View& h, int m, int width, int k, int activation, float limit) {
    constexpr int ROWS = LEFTS * 8;
    __shared__ float sums[TILES * 8][LEFTS * 16];
    int first = blockIdx.x * ROWS, g = threadIdx.x % 32 / 4;
    const bf16* rows[LEFTS][2];
#pragma unroll
    for (int l = 0; l < LEFTS; l++) {
        int own = min(first + l * 8 + g, width - 1);
        rows[l][0] = row(w, own), rows[l][1] = row(w, width + own);
    }
    products<LEFTS, TILES>(sums, rows, x, m, k);
    for (int i = threadIdx.x; i < m * ROWS; i += THREADS) {
        int r = i / ROWS, at = i % ROWS, gate = at / 8 * 16 + at % 8;
        if (first + at >= width) continue;
        store(row(h, r) + first + at, activate(sums[r][gate], activation, limit).value * sums[r][gate + 8]);
    }
}

// Y = X Wᵀ, plus a bias and C where they are given, for at most TILES times eight rows; W is [n, k]. In bf16, in f32; and
// H = act(X Gᵀ) (X Uᵀ): W is [2 width, k], gate and then up.
#define KERNELS(ROWS_OF_X, LEFTS, TILES)                                                                                                \
    extern "C" __global__ void __launch_bounds__(THREADS, 3 - LEFTS)                                                                    \
        skinny_##ROWS_OF_X(View x, View w, View c, const bf16* bias, bf16* y, long long ld, int m, int n, int k) {                         \
        after_previous();                                                                                                               \
        skinny_of<LEFTS, TILES>(x, w, c, bias, y, ld, m, n, k);                                                                            \
    }                                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 3 - LEFTS)                                                                    \
        skinny_wide_##ROWS_OF_X(View x, View w, View c, const bf16* bias, float* y, long long ld, int m, int n, int k) {                   \
        after_previous();                                                                                                               \
        skinny_of<LEFTS, TILES>(x, w, c, bias, y, ld, m, n, k);                                                                            \
    }                                                                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS, 3 - LEFTS)                                                                    \
        skinny_gated_##ROWS_OF_X(View x, View w, View h, int m, int width, int k, int activation, float limit) {                           \
        after_previous();                                                                                                               \
        gated_of<LEFTS, TILES>(x, w, h, m, width, k, activation, limit);                                                                \
    }

KERNELS(8, 1, 1)
KERNELS(16, 1, 2)
KERNELS(32, 2, 4)
