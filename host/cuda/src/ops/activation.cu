// y = act(x), and its VJP; see activations.cuh.

extern "C" __global__ void activation(View x, View y, int tokens, int width, int kind, float limit) {
    auto [token, i] = place(width);
    if (i >= width) return;
    Eight v = load8(row(x, token) + i);
#pragma unroll
    for (int j = 0; j < 8; j++) v.v[j] = activate(v.v[j], kind, limit).value;
    store8(row(y, token) + i, v);
}

// `dx` may be `dy`.
extern "C" __global__ void activation_vjp(View x, View dy, View dx, int tokens, int width, int kind, float limit) {
    auto [token, i] = place(width);
    if (i >= width) return;
    Eight v = load8(row(x, token) + i), d = load8(row(dy, token) + i);
#pragma unroll
    for (int j = 0; j < 8; j++) d.v[j] *= activate(v.v[j], kind, limit).derivative;
    store8(row(dx, token) + i, d);
}
