// xIELU with p = softplus(alpha_p) and n = beta + softplus(alpha_n): p x^2 + beta x above 0, else n (expm1(min(x, eps)) - x) + beta x;
// and its VJP.

struct Curve {
    float p, n, beta, eps;
};

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }

__device__ __forceinline__ Curve curve(const bf16* alpha_p, const bf16* alpha_n, const bf16* beta, const bf16* eps) {
    float b = to_float(*beta);
    return {softplus(to_float(*alpha_p)), b + softplus(to_float(*alpha_n)), b, to_float(*eps)};
}

extern "C" __global__ void xielu(View x, View y, int tokens, int width, const bf16* alpha_p, const bf16* alpha_n,
                                 const bf16* beta, const bf16* eps) {
    auto [token, i] = place(width);
    if (i >= width) return;
    Curve c = curve(alpha_p, alpha_n, beta, eps);
    Eight v = load8(row(x, token) + i);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float a = v.v[j];
        v.v[j] = (a > 0.f ? c.p * a * a : c.n * (expm1f(fminf(a, c.eps)) - a)) + c.beta * a;
    }
    store8(row(y, token) + i, v);
}

// `dx` may be `dy`.
extern "C" __global__ void xielu_vjp(View x, View dy, View dx, int tokens, int width, const bf16* alpha_p, const bf16* alpha_n,
                                     const bf16* beta, const bf16* eps) {
    auto [token, i] = place(width);
    if (i >= width) return;
    Curve c = curve(alpha_p, alpha_n, beta, eps);
    Eight v = load8(row(x, token) + i), d = load8(row(dy, token) + i);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float a = v.v[j];
        d.v[j] *= (a > 0.f ? 2.f * c.p * a : c.n * (a < c.eps ? expm1f(a) : -1.f)) + c.beta;
    }
    store8(row(dx, token) + i, d);
}
