// y_t = act(sum_j w[TAPS - 1 - j] x_(t-j) + b) of every column, and its VJP. Behind an answer's first token lie the prompt's last ones,
// behind the prompt's first nothing. A thread has eight columns of RUN rows that follow on each other: where they, and what they read, are
// of one segment, a prompt or an answer, it reads every row once, elsewhere it looks up what lies before each. TAPS is the number of
// weights of a column.

// Where a token is: how many of its segment are before it, and after it; rows that lie between the prompt and its answer; its position.
struct Segment {
    u32 before, after, jump, position;
};

struct Conv {
    const bf16 *w, *b;
    // Where a text is continued, the TAPS - 1 rows before it.
    bf16* tail;
    int tokens, width, silu, unused;
};

// Weights of eight columns, that of the token itself first.
struct Taps {
    float w[TAPS][8], b[8];
};

__device__ __forceinline__ Taps taps(const Conv& n, int column) {
    Taps out;
    Eight raw[TAPS];
#pragma unroll
    for (int i = 0; i < TAPS; i++) raw[i] = load8(n.w + (long long)column * TAPS + 8 * i);
#pragma unroll
    for (int i = 0; i < 8 * TAPS; i++) out.w[TAPS - 1 - i % TAPS][i / TAPS] = raw[i / 8].v[i % 8];
    Eight b = {};
    if (n.b) b = load8(n.b + column);
#pragma unroll
    for (int i = 0; i < 8; i++) out.b[i] = b.v[i];
    return out;
}

// Eight values as they lie.
__device__ __forceinline__ uint4 load(const View& x, int r, int column) { return *(const uint4*)(row(x, r) + column); }

__device__ __forceinline__ float value(const uint4& raw, int i) {
    u32 word = i < 2 ? raw.x : i < 4 ? raw.y : i < 6 ? raw.z : raw.w;
    return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
}

// The token `j` before one, or zeros.
__device__ __forceinline__ uint4 before(const View& x, const Conv& n, const Segment& s, int r, int j, int column) {
    if (j > s.position) return {};
    if (j > r && n.tail) return *(const uint4*)(n.tail + (TAPS - 1 + r - j) * (long long)n.width + column);
    return load(x, r - j - (j > s.before ? (int)s.jump : 0), column);
}

// Of x[0], the token itself, x[-1], the one before it, and so on.
__device__ __forceinline__ Eight convolve(const Taps& w, const uint4* x) {
    Eight out;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        out.v[i] = w.b[i];
#pragma unroll
        for (int j = 0; j < TAPS; j++) out.v[i] += w.w[j][i] * value(x[-j], i);
    }
    return out;
}

__device__ __forceinline__ void window_of(uint4 (&window)[TAPS], const Segment& s, const View& x, const Conv& n, int r, int column) {
#pragma unroll
    for (int j = 0; j < TAPS; j++) window[TAPS - 1 - j] = before(x, n, s, r, j, column);
}

__device__ __forceinline__ void activate(const Conv& n, Eight& z) {
    if (!n.silu) return;
#pragma unroll
    for (int i = 0; i < 8; i++) z.v[i] = __fdividef(z.v[i], 1.f + __expf(-z.v[i]));
}

// The gradient before the activation.
__device__ __forceinline__ Eight bend(const Conv& n, const uint4& dy, const Eight& z) {
    Eight out;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float s = __fdividef(1.f, 1.f + __expf(-z.v[i]));
        out.v[i] = value(dy, i) * (n.silu ? s * (1.f + z.v[i] * (1.f - s)) : 1.f);
    }
    return out;
}

// Whether a thread's rows, with so many before and behind them, are of one segment.
__device__ __forceinline__ bool is_one_segment(const Segment* segments, int r, int tokens, int behind) {
    if (r + RUN > tokens || r < TAPS - 1) return false;
    Segment last = segments[r + RUN - 1];
    return last.before >= RUN + TAPS - 2 && last.after >= behind;
}

extern "C" __global__ void __launch_bounds__(128) causal_conv(const Segment* segments, View x, View y, Conv n) {
    Place at = place(n.width);
    int first = (int)at.row * RUN, column = at.column;
    if (column >= n.width) return;
    if (is_one_segment(segments, first, n.tokens, 0)) {
        uint4 rows[RUN + TAPS - 1];
#pragma unroll
        for (int i = 0; i < RUN + TAPS - 1; i++) rows[i] = load(x, first + i - (TAPS - 1), column);
        Taps w = taps(n, column);
#pragma unroll
        for (int i = 0; i < RUN; i++) {
            Eight z = convolve(w, rows + i + TAPS - 1);
            activate(n, z);
            store8(row(y, first + i) + column, z);
        }
        return;
    }
    Taps w = taps(n, column);
#pragma unroll 1
    for (int r = first; r < min(first + RUN, n.tokens); r++) {
        uint4 window[TAPS];
        window_of(window, segments[r], x, n, r, column);
        Eight z = convolve(w, window + TAPS - 1);
        activate(n, z);
        store8(row(y, r) + column, z);
    }
}

// Keeps the last rows of a text: of the new ones, and of those before where the new ones are fewer.
extern "C" __global__ void __launch_bounds__(128) causal_conv_tail(const Segment* segments, View x, Conv n) {
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (column >= n.width) return;
    for (int i = 0; i < TAPS - 1; i++) {
        int from = i + n.tokens - (TAPS - 1);
        bf16* to = n.tail + (long long)i * n.width + column;
        *(uint4*)to = from >= 0 ? load(x, from, column) : *(const uint4*)(to + (long long)n.tokens * n.width);
    }
}

// Adds what a token gives to the gradient of the one `j` before it.
__device__ __forceinline__ void add_tap(Eight& to, const Taps& w, int j, const Eight& d) {
#pragma unroll
    for (int tap = 0; tap < TAPS; tap++)
#pragma unroll
        for (int i = 0; i < 8; i++) to.v[i] += tap == j ? w.w[tap][i] * d.v[i] : 0.f;
}

extern "C" __global__ void __launch_bounds__(128) causal_conv_vjp(const Segment* segments, View x, View dy, View dx, Conv n) {
    Place at = place(n.width);
    int first = (int)at.row * RUN, column = at.column;
    if (column >= n.width) return;
    if (is_one_segment(segments, first, n.tokens, TAPS - 1)) {
        uint4 rows[RUN + 2 * TAPS - 2], dys[RUN + TAPS - 1];
#pragma unroll
        for (int i = 0; i < RUN + 2 * TAPS - 2; i++) rows[i] = load(x, first + i - (TAPS - 1), column);
#pragma unroll
        for (int i = 0; i < RUN + TAPS - 1; i++) dys[i] = load(dy, first + i, column);
        Taps w = taps(n, column);
        // Sums of the rows that what is at hand reads, the nearest last.
        Eight sums[TAPS] = {};
#pragma unroll
        for (int i = 0; i < RUN + TAPS - 1; i++) {
            Eight d = bend(n, dys[i], convolve(w, rows + i + TAPS - 1));
#pragma unroll
            for (int j = 0; j < TAPS; j++)
#pragma unroll
                for (int e = 0; e < 8; e++) sums[TAPS - 1 - j].v[e] += w.w[j][e] * d.v[e];
            if (i >= TAPS - 1) store8(row(dx, first + i - (TAPS - 1)) + column, sums[0]);
#pragma unroll
            for (int j = 0; j < TAPS; j++) sums[j] = j + 1 < TAPS ? sums[j + 1] : Eight{};
        }
        return;
    }
    Taps w = taps(n, column);
#pragma unroll 1
    for (int r = first; r < min(first + RUN, n.tokens); r++) {
        Segment s = segments[r];
        Eight out = {};
        // Tokens behind it in its own segment, then those of every answer that begins behind the prompt's end.
        int rest = s.after, from = r, count = min((int)s.after + 1, TAPS);
        bool of_prompt = s.before == s.position;
        for (int skipped = 0; count > 0;) {
#pragma unroll 1
            for (int i = 0; i < count; i++) {
                uint4 window[TAPS];
                window_of(window, segments[from + i], x, n, from + i, column);
                add_tap(out, w, skipped + i, bend(n, load(dy, from + i, column), convolve(w, window + TAPS - 1)));
            }
            from += rest + 1;
            if (!of_prompt || from >= n.tokens || segments[from].position == 0) break;
            skipped = s.after + 1;
            rest = segments[from].after;
            count = min(rest + 1, TAPS - skipped);
        }
        store8(row(dx, r) + column, out);
    }
}
