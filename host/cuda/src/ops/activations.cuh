// Activations and their derivatives, in the order of ACTIVATIONS in activation.rs.

struct Activation {
    float value, derivative;
};

__device__ __forceinline__ Activation activate(float x, int kind, float limit) {
    switch (kind) {
        case 0: {  // silu
            float s = 1.f / (1.f + __expf(-x));
            return {x * s, s * (1.f + x * (1.f - s))};
        }
        case 1: {  // gelu
            float cdf = 0.5f * (1.f + erff(x * 0.70710678f));
            return {x * cdf, cdf + x * 0.39894228f * expf(-0.5f * x * x)};
        }
        case 2: {  // gelu_tanh
            float inner = 0.79788456f * (x + 0.044715f * x * x * x), t = tanhf(inner), slope = 0.79788456f * (1.f + 0.134145f * x * x);
            return {0.5f * x * (1.f + t), 0.5f * (1.f + t) + 0.5f * x * (1.f - t * t) * slope};
        }
        case 3: {  // relu2
            float positive = fmaxf(x, 0.f);
            return {positive * positive, 2.f * positive};
        }
        case 4: {  // sigmoid
            float s = 1.f / (1.f + __expf(-x));
            return {s, s * (1.f - s)};
        }
        case 5:  // identity
            return {x, 1.f};
        default:  // clamp
            return {fminf(fmaxf(x, -limit), limit), fabsf(x) <= limit ? 1.f : 0.f};
    }
}
