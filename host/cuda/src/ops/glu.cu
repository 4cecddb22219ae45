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

// The same where every column of the gate carries a run of up's, a multiple of 8.
extern "C" __global__ void glu_of_runs(View gate, View up, View y, int tokens, int width, int kind, float limit, int run) {
    after_previous();
    auto [token, i] = place(width);
    if (i >= width) return;
    Eight u = load8(row(up, token) + i);
    float value = activate(to_float(row(gate, token)[i / run]), kind, limit).value;
#pragma unroll
    for (int j = 0; j < 8; j++) u.v[j] *= value;
    store8(row(y, token) + i, u);
}

// Its VJP, a warp for every column of the gate; behind the last one there are zeros.
extern "C" __global__ void glu_of_runs_vjp(View gate, View up, View dy, View dgate, View dup, int tokens, int width, int kind,
                                           float limit, int run) {
    after_previous();
    int columns = (width / run + 7) / 8 * 8, at = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    int token = at / columns, column = at % columns;
    if (token >= tokens) return;
    float sum = 0.f;
    if (column < width / run) {
        Activation a = activate(to_float(row(gate, token)[column]), kind, limit);
        for (int i = column * run + lane * 8; i < (column + 1) * run; i += 256) {
            Eight u = load8(row(up, token) + i), d = load8(row(dy, token) + i);
#pragma unroll
            for (int j = 0; j < 8; j++) sum += d.v[j] * u.v[j], u.v[j] = d.v[j] * a.value;
            store8(row(dup, token) + i, u);
        }
        sum *= a.derivative;
    }
    sum = warp_sum(sum);
    if (lane == 0) row(dgate, token)[column] = to_bf16(sum);
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
