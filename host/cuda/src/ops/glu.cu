// y = act(gate) * up, and its VJP; see activations.cuh.

extern "C" __global__ void glu(View gate, View up, View y, int tokens, int width, int kind, float limit) {
    after_previous();
    auto [token, i] = place(width);
    if (i >= width) return;
    Eight g = load8(row(gate, token) + i), u = load8(row(up, token) + i);
#pragma unroll
    for (int j = 0; j < 8; j++) u.v[j] *= activate(g.v[j], kind, limit).value;
    store8(row(y, token) + i, u);
}

// `dgate` and `dup` may be `gate` and `up`.
extern "C" __global__ void glu_vjp(View gate, View up, View dy, View dgate, View dup, int tokens, int width, int kind,
                                   float limit) {
    after_previous();
    auto [token, i] = place(width);
    if (i >= width) return;
    Eight g = load8(row(gate, token) + i), u = load8(row(up, token) + i), d = load8(row(dy, token) + i);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        Activation a = activate(g.v[j], kind, limit);
        g.v[j] = d.v[j] * u.v[j] * a.derivative;
        u.v[j] = d.v[j] * a.value;
    }
    store8(row(dgate, token) + i, g);
    store8(row(dup, token) + i, u);
}
