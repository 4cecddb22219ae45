//! What is said of an architecture that no family answers for: what it would take, and which family is near.

use dpo_core::error::Error;

/// Parts of architectures' names, and what such models have that is not computed here. The first part that is found counts.
const KINDS: &[(&[&str], &str)] = &[
    (
        &["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "RewardModel"],
        "it gives classes or scores, not text: alignment trains a causal language model (…ForCausalLM)",
    ),
    (
        &["T5", "Bart", "Pegasus", "Marian", "M2M100", "Nllb", "Whisper", "Blenderbot", "EncoderDecoder", "Seq2Seq"],
        "it has an encoder beside its decoder, which is not computed here",
    ),
    (
        &["Bert", "Electra", "MaskedLM", "XLNet"],
        "it is an encoder: every token sees those behind it, so that it writes no text",
    ),
    (
        &["DeepseekV32", "DeepseekV4", "GlmMoeDsa", "LongcatFlash", "Mistral4"],
        "its kind of multi-head latent attention (MLA) is not computed here",
    ),
    (
        &[
            "Mamba",
            "Rwkv",
            "RWKV",
            "RecurrentGemma",
            "Qwen4",
            "Zamba",
            "Jamba",
            "KimiLinear",
            "MiniMaxForCausal",
            "MiniMaxText01",
            "xLSTM",
            "XLSTM",
            "RetNet",
            "Hybrid",
            "BailingHybrid",
        ],
        "it has recurrent layers of a kind that is not computed here",
    ),
    (
        &["Moe", "MoE", "MOE", "Mixtral", "GptOss", "Dbrx", "DBRX", "Grok", "Arctic", "Llama4"],
        "its experts with a router are of a kind that is not computed here",
    ),
    (
        &[
            "VL",
            "Vision",
            "Llava",
            "Idefics",
            "PaliGemma",
            "Pixtral",
            "Omni",
            "Audio",
            "ImageText",
            "ForConditionalGeneration",
        ],
        "it takes images, sound or video; such a model can be trained on text where a family reads the language model in it, with \
         rows of images refused, and none reads this one",
    ),
    (
        &["GPT2", "OPT", "GPTNeoForCausal", "Bloom", "MPT", "CodeGen", "GPTBigCode"],
        "its positions are learned or ALiBi, not rotary, which is not computed here",
    ),
];

/// Ends that say what a class is for, not what it computes.
const ENDS: &[&str] = &["ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "Model"];

/// The error for it; `claims` are families with the architectures that they answer for.
pub(super) fn unclaimed<'a>(architecture: &str, claims: impl Iterator<Item = (&'a str, &'a str)>) -> Error {
    let kind = KINDS.iter().find(|(parts, _)| parts.iter().any(|part| architecture.contains(part)));
    let why = kind.map(|(_, why)| format!(": {why}")).unwrap_or_default();
    let bare = |name: &str| {
        let end = ENDS.iter().find_map(|end| name.strip_suffix(end));
        end.unwrap_or(name).to_lowercase()
    };
    let claims: Vec<(String, &str, &str)> = claims.map(|(family, claim)| (bare(claim), claim, family)).collect();
    let nearest = Error::nearest(&bare(architecture), claims.iter().map(|(bare, ..)| bare.as_str()));
    let near = claims.iter().find(|(bare, ..)| Some(bare.as_str()) == nearest).map(|(_, claim, family)| {
        format!(
            "did you mean {claim} of '{family}'? where the model computes what that does, give it that name in config.json; "
        )
    });
    Error::input(format!("no plugin answers for the architecture '{architecture}'{why}")).help(format!(
        "{}`dpo-host list models` has those that are read; `dpo-host new model NAME` begins a plugin for another, see docs/plugins.md",
        near.unwrap_or_default()
    ))
}
