// y_t = act(sum_j w[TAPS - 1 - j] x_(t-j) + b) of every column, and its VJP. Behind an answer's first token lie the prompt's last ones,
// behind the prompt's first nothing. A thread has eight columns of RUN rows that follow on each other, and keeps what it read of them.
// TAPS is the number of weights of a column.

#define RUN 16

// Where a token is: how many of its prompt or its answer are before it, and after it; rows that lie between the prompt and its answer; its
// position.
struct Segment {
    u32 before, after, jump, position;
};

struct Conv {
    const bf16 *w, *b;
    int tokens, width, silu;
};

// Weights of eight columns.
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

// The token `j` before one, or zeros.
__device__ __forceinline__ Eight before(const View& x, const Segment& s, int r, int j, int column) {
    if (j > s.position) return {};
    return load8(row(x, r - j - (j > s.before ? (int)s.jump : 0)) + column);
}

__device__ __forceinline__ Eight convolve(const Taps& w, const Eight (&x)[TAPS]) {
    Eight out;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        out.v[i] = w.b[i];
#pragma unroll
        for (int j = 0; j < TAPS; j++) out.v[i] += w.w[j][i] * x[j].v[i];
    }
    return out;
}

// The gradient by what the activation is of.
__device__ __forceinline__ Eight bend(const Conv& n, Eight dy, const Eight& z) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float s = 1.f / (1.f + __expf(-z.v[i]));
        if (n.silu) dy.v[i] *= s * (1.f + z.v[i] * (1.f - s));
    }
    return dy;
}

__device__ __forceinline__ Place run_place(int width) {
    Place at = place(width);
    return {at.row * RUN, at.column};
}

extern "C" __global__ void causal_conv(const Segment* segments, View x, View y, Conv n) {
    Place at = run_place(n.width);
    if (at.column >= n.width) return;
    Taps w = taps(n, at.column);
    Eight window[TAPS];
    int end = min((int)at.row + RUN, n.tokens);
#pragma unroll 4
    for (int r = at.row; r < end; r++) {
        Segment s = segments[r];
#pragma unroll
        for (int j = TAPS - 1; j > 0; j--) {
            if (r == at.row || s.before == 0) window[j] = before(x, s, r, j, at.column);
            else window[j] = window[j - 1];
        }
        window[0] = load8(row(x, r) + at.column);
        Eight z = convolve(w, window);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (n.silu) z.v[i] /= 1.f + __expf(-z.v[i]);
        store8(row(y, r) + at.column, z);
    }
}

// The gradient before the activation of one token, from its window alone.
__device__ __forceinline__ Eight bent(const Segment* segments, const View& x, const View& dy, const Conv& n, const Taps& w, int r, int column) {
    Segment s = segments[r];
    Eight window[TAPS];
#pragma unroll
    for (int j = 0; j < TAPS; j++) window[j] = before(x, s, r, j, column);
    return bend(n, load8(row(dy, r) + column), convolve(w, window));
}

// What answers give to one of the prompt's last tokens, answer by answer.
__device__ __noinline__ Eight of_answers(const Segment* segments, const View& x, const View& dy, const Conv& n, const Taps& w, int r, int column) {
    Eight out = {};
    Segment s = segments[r];
    for (int first = r + s.after + 1; first < n.tokens && segments[first].position > 0;) {
        int count = segments[first].after + 1;
        for (int i = 0; i < count && s.after + 1 + i < TAPS; i++) {
            Eight d = bent(segments, x, dy, n, w, first + i, column);
            int j = s.after + 1 + i;
#pragma unroll
            for (int tap = 1; tap < TAPS; tap++)
                if (tap == j)
                    for (int e = 0; e < 8; e++) out.v[e] += w.w[tap][e] * d.v[e];
        }
        first += count;
    }
    return out;
}

extern "C" __global__ void causal_conv_vjp(const Segment* segments, View x, View dy, View dx, Conv n) {
    Place at = run_place(n.width);
    if (at.column >= n.width) return;
    Taps w = taps(n, at.column);
    int end = min((int)at.row + RUN, n.tokens), from = end - 1 + min((int)segments[end - 1].after, TAPS - 1);
    // Gradients of the tokens behind, and tokens before.
    Eight ahead[TAPS] = {}, window[TAPS];
#pragma unroll 4
    for (int r = from; r >= at.row; r--) {
        Segment s = segments[r];
        bool begins = r == from || s.after == 0;
#pragma unroll
        for (int j = TAPS - 1; j > 0; j--) ahead[j] = begins ? Eight{} : ahead[j - 1];
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++) {
            if (begins) window[j] = before(x, s, r, j, at.column);
            else window[j] = window[j + 1];
        }
        window[TAPS - 1] = before(x, s, r, TAPS - 1, at.column);
        ahead[0] = bend(n, load8(row(dy, r) + at.column), convolve(w, window));
        if (r >= end) continue;
        Eight out = {};
        if (s.jump == 0 && s.before == s.position && s.after < TAPS - 1) out = of_answers(segments, x, dy, n, w, r, at.column);
#pragma unroll
        for (int j = 0; j < TAPS; j++)
#pragma unroll
            for (int i = 0; i < 8; i++) out.v[i] += w.w[j][i] * ahead[j].v[i];
        store8(row(dx, r) + at.column, out);
    }
}
