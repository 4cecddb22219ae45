// y = factor * x, times a number of the checkpoint where there is one; y may be x.
extern "C" __global__ void scale(View x, View y, int tokens, int width, float factor, const bf16* weight) {
    auto [token, i] = place(width);
    if (i >= width) return;
    if (weight) factor *= to_float(*weight);
    Eight v = load8(row(x, token) + i);
#pragma unroll
    for (int j = 0; j < 8; j++) v.v[j] *= factor;
    store8(row(y, token) + i, v);
}
