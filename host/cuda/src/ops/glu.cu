// y = act(gate) * up, and its VJP. `kind` 0: silu, 1: gelu, 2: gelu by tanh.

struct Activation {
    float value, derivative;
};

__device__ __forceinline__ Activation activate(float x, int kind) {
    if (kind == 0) {
        float s = 1.f / (1.f + __expf(-x));
        return {x * s, s * (1.f + x * (1.f - s))};
    }
    if (kind == 1) {
        float cdf = 0.5f * (1.f + erff(x * 0.70710678f));
        return {x * cdf, cdf + x * 0.39894228f * expf(-0.5f * x * x)};
    }
    float inner = 0.79788456f * (x + 0.044715f * x * x * x), t = tanhf(inner);
    return {0.5f * x * (1.f + t), 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * 0.79788456f * (1.f + 0.134145f * x * x)};
}

extern "C" __global__ void glu(View gate, View up, View y, int tokens, int width, int kind) {
    auto [token, i] = place(width);
    if (i >= width) return;
    Eight g = load8(row(gate, token) + i), u = load8(row(up, token) + i);
#pragma unroll
    for (int j = 0; j < 8; j++) u.v[j] *= activate(g.v[j], kind).value;
    store8(row(y, token) + i, u);
}

// `dgate` and `dup` may be `gate` and `up`.
extern "C" __global__ void glu_vjp(View gate, View up, View dy, View dgate, View dup, int tokens, int width, int kind) {
    auto [token, i] = place(width);
    if (i >= width) return;
    Eight g = load8(row(gate, token) + i), u = load8(row(up, token) + i), d = load8(row(dy, token) + i);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        Activation a = activate(g.v[j], kind);
        g.v[j] = d.v[j] * u.v[j] * a.derivative;
        u.v[j] = d.v[j] * a.value;
    }
    store8(row(dgate, token) + i, g);
    store8(row(dup, token) + i, u);
}
