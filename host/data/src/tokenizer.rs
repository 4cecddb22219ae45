//! `tokenizer.json`, a stranger's file: what a text may grow to while it is normalised or decoded is bounded, and a panic of the
//! library is an error.
//!
//! A few normalizers of a line each, one behind the other, make gigabytes of a word. So the file's own texts are checked to be
//! short before the library reads it, and every step is checked to stay within a multiple of the text.

use std::cell::Cell;
use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use dpo_plugin_api::abi::guard;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{
    AddedToken, Decoder, DecoderWrapper, ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper,
    PostProcessorWrapper, PreTokenizerWrapper, TokenizerImpl,
};

use super::chat::special_tokens;
use dpo_core::error::{Error, Result};

/// Most bytes that a normalizer or a decoder may write for what it finds. Published ones write up to 33.
const MOST_WRITTEN: usize = 64;
/// How much longer a text may become by all of them. Unicode's own normal forms make it up to 11 times as long.
const MOST_GROWTH: usize = 16;
/// How much longer the next one alone could make it.
const MOST_GROWTH_OF_STEP: usize = 64;
/// Bytes that a short text may grow by, whatever they are as a multiple.
const FREE: usize = 1 << 16;

type Parsed = TokenizerImpl<ModelWrapper, Normalizers, PreTokenizerWrapper, PostProcessorWrapper, Decoders>;

/// A tokenizer.
pub(super) struct Tokenizer(Parsed);

impl Tokenizer {
    /// Reads the file, and makes of it what transformers makes with the checkpoint's settings.
    ///
    /// # Errors
    /// A file that is missing or broken, that makes texts too long, or other tokens each time.
    pub(super) fn open(path: &Path, settings: &Settings) -> Result<Tokenizer> {
        let text = dpo_core::files::read_text(path)?;
        let help = "fetch tokenizer.json again, or save it with transformers: AutoTokenizer.from_pretrained(dir).save_pretrained(dir)";
        let broken = |what: String| Error::input(format!("broken tokenizer: {what}")).at(path.display()).help(help);
        let parts: Parts = serde_json::from_str(&text).map_err(|e| broken(e.to_string()))?;
        for part in [&parts.normalizer, &parts.decoder] {
            check_written(part).map_err(|e| e.at(path.display()))?;
        }
        if let Some(dropout) = parts.model.dropout.filter(|d| *d != 0.0) {
            return Err(Error::input(format!("dropout {dropout} of the tokenizer gives other tokens each time"))
                .at(path.display())
                .help("set model.dropout to null"));
        }
        let opened = guard(|| Ok(serde_json::from_str(&text))).map_err(|e| broken(e.message))?;
        let mut tokenizer: Parsed = opened.map_err(|e| broken(e.to_string()))?;
        // Some added tokens are normalised.
        if let Some(why) = REFUSED.take() {
            return Err(broken(why));
        }
        // transformers ignores what the file says about cutting and filling unless it is asked for.
        tokenizer.with_truncation(None).map_err(|e| broken(e.to_string()))?.with_padding(None);
        if let Some(scheme) = settings.metaspace.filter(|_| !text.contains("\"ByteLevel\"")) {
            tokenizer.with_normalizer(None::<Normalizers>).map_err(|e| broken(e.to_string()))?;
            tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', scheme, false)));
        }
        let known = tokenizer.get_added_tokens_decoder();
        let is_new = |content: &&String| !known.values().any(|token| token.content == **content);
        let named = settings.named.iter().filter(is_new).map(|content| AddedToken::from(content.as_str(), true));
        let tokens: Vec<AddedToken> = settings.described.iter().cloned().chain(named).collect();
        tokenizer.add_tokens(tokens).map_err(|e| broken(e.to_string()))?;
        Ok(Tokenizer(tokenizer))
    }

    /// Ids of a text, with what the tokenizer puts around it where `special` asks for that.
    pub(super) fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let encode = || {
            REFUSED.set(None);
            let encoding = self.0.encode_fast(text, special)?;
            REFUSED.take().map_or_else(|| Ok(encoding.get_ids().to_vec()), |why| Err(why.into()))
        };
        guarded(encode).map_err(|what| Error::input(format!("cannot be tokenised: {what}")))
    }

    /// The text of ids, with special tokens or without; `None` where there is none.
    pub(super) fn decode(&self, ids: &[u32], special: bool) -> Option<String> {
        guarded(|| self.0.decode(ids, !special)).ok()
    }

    /// The id of a token's text.
    pub(super) fn id(&self, token: &str) -> Option<u32> {
        self.0.token_to_id(token)
    }

    /// The text of one token.
    pub(super) fn token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }

    /// The text of an added token, if every text is split at it wherever it stands: it is looked for before the text is normalised, takes no
    /// spaces from what is beside it, and no other added token can overlap with it. What is behind such a split has the ids that it has
    /// in the whole text, as long as it begins with the token.
    pub(super) fn always_splits(&self, id: u32) -> Option<String> {
        let added = self.0.get_added_tokens_decoder();
        let token = added.get(&id).filter(|t| !t.normalized && !t.lstrip && !t.rstrip && !t.single_word)?;
        let text = token.content.as_str();
        let continues =
            |other: &str| (1..text.len()).any(|at| text.is_char_boundary(at) && other.ends_with(&text[..at]));
        let overlaps = |other: &str| other.contains(text) && other != text || continues(other);
        (!text.is_empty() && !added.values().any(|other| overlaps(&other.content))).then(|| text.to_owned())
    }

    /// Ids of the special tokens that were added to the model's.
    pub(super) fn special_ids(&self) -> Vec<u32> {
        let added = self.0.get_added_tokens_decoder();
        added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect()
    }
}

/// What a checkpoint's other files say about its tokenizer, as transformers 5.24 reads them (`TokenizersBackend.__init__` of
/// `tokenization_utils_tokenizers.py`).
#[derive(Default)]
pub(super) struct Settings {
    /// Tokens that are split off before all else, as they are described.
    described: Vec<AddedToken>,
    /// Special tokens that are only named.
    named: Vec<String>,
    /// How spaces are written where transformers builds the tokenizer by its class, LlamaTokenizer, and not from the file.
    metaspace: Option<PrependScheme>,
}

/// Types of models whose tokenizers are what the file says, whatever class is named beside it (`TOKENIZER_MAPPING_NAMES` and
/// `MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS` of `models/auto/tokenization_auto.py`).
const AS_THE_FILE_SAYS: [&str; 16] = [
    "ernie4_5",
    "glm",
    "glm4",
    "granite",
    "granitemoehybrid",
    "internlm3",
    "iquestcoder",
    "ministral",
    "ministral3",
    "mistral",
    "nemotron",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "stablelm",
];

impl Settings {
    /// The settings in `tokenizer_config.json`, with the `model_type` of `config.json`.
    pub(super) fn new(config: &Value, model_type: Option<&str>) -> Settings {
        let named = special_tokens(config);
        let flag = |name: &str| config.get(name).and_then(Value::as_bool);
        let of_llama = config.get("tokenizer_class").and_then(Value::as_str);
        let of_llama = of_llama.is_some_and(|class| class.trim_end_matches("Fast") == "LlamaTokenizer")
            && config.get("auto_map").is_none()
            && !model_type.is_some_and(|kind| AS_THE_FILE_SAYS.contains(&kind));
        let scheme = match (flag("add_prefix_space"), flag("legacy")) {
            (Some(false), _) => PrependScheme::Never,
            (_, Some(true)) => PrependScheme::Always,
            _ => PrependScheme::First,
        };
        let (described, named) = added_tokens(config, &named);
        Settings { described, named, metaspace: of_llama.then_some(scheme) }
    }
}

/// Tokens that are described, in the order of their ids, and special ones that are only named.
fn added_tokens(config: &Value, named: &Map<String, Value>) -> (Vec<AddedToken>, Vec<String>) {
    let mut described: Vec<(u64, AddedToken)> = Vec::new();
    for (id, token) in config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten() {
        let flag = |name: &str| token.get(name).and_then(Value::as_bool);
        let Some(content) = token.get("content").and_then(Value::as_str) else { continue };
        let special = flag("special").unwrap_or(false) || named.values().any(|name| name == content);
        let made = AddedToken::from(content.to_owned(), special)
            .single_word(flag("single_word").unwrap_or(false))
            .lstrip(flag("lstrip").unwrap_or(false))
            .rstrip(flag("rstrip").unwrap_or(false))
            .normalized(flag("normalized").unwrap_or(true));
        described.push((id.parse().unwrap_or(u64::MAX), made));
    }
    described.sort_by_key(|(id, _)| *id);
    let described: Vec<AddedToken> = described.into_iter().map(|(_, token)| token).collect();
    let listed = |name: &str| match config.get(name) {
        Some(Value::Array(list)) => list.to_vec(),
        Some(Value::Object(keys)) => keys.values().cloned().collect(),
        _ => Vec::new(),
    };
    let more = ["additional_special_tokens", "extra_special_tokens"].into_iter().flat_map(listed);
    let mut names = Vec::new();
    for token in named.values().cloned().chain(more) {
        let content = token.as_str().or(token.get("content").and_then(Value::as_str)).unwrap_or("").to_owned();
        if !names.contains(&content) && !described.iter().any(|t| t.content == content) {
            names.push(content);
        }
    }
    (described, names)
}

/// What the library answers, or why it does not.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    guard(|| Ok(call().map_err(|e| e.to_string())))
        .unwrap_or_else(|e| Err(format!("tokenizer.json fails, {}", e.message)))
}

/// What of the file is read before the library reads it.
#[derive(Deserialize)]
struct Parts {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    model: Model,
}

#[derive(Default, Deserialize)]
struct Model {
    #[serde(default)]
    dropout: Option<f64>,
}

/// Refuses a normalizer or decoder that writes long texts.
fn check_written(part: &Value) -> Result<()> {
    let too_long = |what: &str, bytes: usize| {
        Err(Error::input(format!(
            "the tokenizer's {what} writes {bytes} bytes for what it finds, more than {MOST_WRITTEN}"
        ))
        .help("no published tokenizer does: fetch tokenizer.json again"))
    };
    match part {
        Value::Object(keys) => {
            let text = |key: &str| keys.get(key).and_then(Value::as_str);
            for key in ["content", "prepend"] {
                if let Some(text) = text(key).filter(|t| t.len() > MOST_WRITTEN) {
                    return too_long(text_type(keys.get("type")), text.len());
                }
            }
            match text("precompiled_charsmap").map(longest_written) {
                Some(None) => return Err(Error::input("broken tokenizer: its precompiled_charsmap is cut short")),
                Some(Some(bytes)) if bytes > MOST_WRITTEN => return too_long("Precompiled", bytes),
                _ => {}
            }
            keys.values().try_for_each(check_written)
        }
        Value::Array(list) => list.iter().try_for_each(check_written),
        _ => Ok(()),
    }
}

fn text_type(kind: Option<&Value>) -> &str {
    kind.and_then(Value::as_str).unwrap_or("normalizer")
}

/// The longest text in a map of SentencePiece: a number of bytes, so many bytes of a trie, then texts that end in 0.
fn longest_written(map: &str) -> Option<usize> {
    let bytes = BASE64_STANDARD.decode(map).ok()?;
    let (trie, rest) = bytes.split_first_chunk()?;
    let texts = rest.get(u32::from_le_bytes(*trie) as usize..)?;
    texts.split(|byte| *byte == 0).map(<[u8]>::len).max()
}

thread_local! {
    /// Why a text was refused while it was normalised: the library drops errors of normalizers.
    static REFUSED: Cell<Option<String>> = const { Cell::new(None) };
}

/// The file's normalizer, step by step.
#[derive(Deserialize)]
#[serde(transparent)]
struct Normalizers(NormalizerWrapper);

impl Normalizer for Normalizers {
    fn normalize(&self, text: &mut NormalizedString) -> tokenizers::Result<()> {
        normalize(&self.0, text, text.get().len()).inspect_err(|e| REFUSED.set(Some(e.to_string())))
    }
}

/// `original` bytes are what the text had before the first step.
fn normalize(normalizer: &NormalizerWrapper, text: &mut NormalizedString, original: usize) -> tokenizers::Result<()> {
    match normalizer {
        NormalizerWrapper::Sequence(steps) => {
            return steps.as_ref().iter().try_for_each(|step| normalize(step, text, original));
        }
        NormalizerWrapper::Replace(replace) => refuse_step(replace.content.len(), text.get().len(), original)?,
        _ => {}
    }
    normalizer.normalize(text)?;
    refuse_growth(text.get().len(), original)
}

/// The file's decoder, step by step.
#[derive(Deserialize)]
#[serde(transparent)]
struct Decoders(DecoderWrapper);

impl Decoder for Decoders {
    fn decode_chain(&self, tokens: Vec<String>) -> tokenizers::Result<Vec<String>> {
        let original = bytes(&tokens);
        decode(&self.0, tokens, original)
    }
}

fn decode(decoder: &DecoderWrapper, tokens: Vec<String>, original: usize) -> tokenizers::Result<Vec<String>> {
    match decoder {
        DecoderWrapper::Sequence(steps) => {
            return steps.get_decoders().iter().try_fold(tokens, |tokens, step| decode(step, tokens, original));
        }
        DecoderWrapper::Replace(replace) => refuse_step(replace.content.len(), bytes(&tokens), original)?,
        _ => {}
    }
    let tokens = decoder.decode_chain(tokens)?;
    refuse_growth(bytes(&tokens), original)?;
    Ok(tokens)
}

fn bytes(tokens: &[String]) -> usize {
    tokens.iter().map(String::len).sum()
}

/// Refuses to replace what may be every letter of a text by so much.
fn refuse_step(written: usize, text: usize, original: usize) -> tokenizers::Result<()> {
    refuse(text.saturating_mul(written + 1), original, MOST_GROWTH_OF_STEP)
}

fn refuse_growth(text: usize, original: usize) -> tokenizers::Result<()> {
    refuse(text, original, MOST_GROWTH)
}

fn refuse(text: usize, original: usize, most: usize) -> tokenizers::Result<()> {
    if text > FREE.saturating_add(original.saturating_mul(most)) {
        return Err(format!("tokenizer.json makes {text} bytes of {original}, more than {most} times as much").into());
    }
    Ok(())
}
