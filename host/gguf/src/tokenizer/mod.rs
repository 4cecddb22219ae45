//! The tokenizer as metadata: its tokens by id, how texts become these, which of them begin and end a text, and the chat template.
//!
//! llama.cpp knows two kinds of BPE: of bytes written as letters (`gpt2`), whose text is split beforehand by rules that it knows by name
//! ([`splits`]), and of sentencepiece (`llama`), which merges by scores ([`scores`]).

mod scores;
mod splits;

use std::path::Path;

use dpo_core::console::Remark;
use dpo_core::error::{Error, Result};
use dpo_data::chat::read_json;
use dpo_data::tokens::ChatTokenizer;
use serde_json::Value as Json;

use crate::file::{Metadata, Value};

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// Tokens by id, and their types (`llama.h`, `enum llama_token_type`).
struct Tokens {
    texts: Vec<String>,
    types: Vec<i32>,
}

/// The metadata of a checkpoint's tokenizer, whose model has so many rows of embeddings.
///
/// # Errors
/// A tokenizer of another kind, or one with steps that llama.cpp does not take.
pub(crate) fn metadata(folder: &Path, chat: &ChatTokenizer, rows: usize) -> Result<(Metadata, Vec<Remark>)> {
    let path = folder.join("tokenizer.json");
    let file = read_json(&path)?;
    let settings = read_json(&folder.join("tokenizer_config.json"))?;
    of(&file, &settings, chat, rows).map_err(|e| e.at(path.display()))
}

fn of(file: &Json, settings: &Json, chat: &ChatTokenizer, rows: usize) -> Result<(Metadata, Vec<Remark>)> {
    let model = file.get("model").unwrap_or(&Json::Null);
    let kind = model.get("type").and_then(Json::as_str).unwrap_or("BPE");
    if kind != "BPE" {
        return Err(refused(format!("a tokenizer of the kind {kind}; BPE is")));
    }
    for affix in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if let Some(text) = model.get(affix).and_then(Json::as_str).filter(|text| !text.is_empty()) {
            return Err(refused(format!("a tokenizer with {affix} '{text}'")));
        }
    }
    let merges = merges(model)?;
    let of_bytes = model.get("byte_fallback").and_then(Json::as_bool) != Some(true);
    let mut tokens = tokens(file, settings, chat, rows)?;
    let mut metadata = Metadata::new();
    let mut put = |key: &str, value: Value| metadata.push((format!("tokenizer.{key}"), value));
    let mut remarks = Vec::new();
    if of_bytes {
        let (name, remark) = splits::name(file)?;
        remarks.extend(remark);
        put("ggml.model", Value::Text("gpt2".into()));
        put("ggml.pre", Value::Text(name.into()));
    } else {
        let (space, remark) = scores::add_space_prefix(file, settings)?;
        remarks.extend(remark);
        put("ggml.model", Value::Text("llama".into()));
        put("ggml.pre", Value::Text("default".into()));
        put("ggml.add_space_prefix", Value::Bool(space));
        put("ggml.scores", Value::F32s(scores::of(&mut tokens, &merges, model)));
    }
    put("ggml.tokens", Value::Texts(tokens.texts));
    put("ggml.token_type", Value::I32s(tokens.types));
    if of_bytes {
        let written = |pair: &[String; 2]| pair.each_ref().map(|part| part.replace(' ', "\u{120}")).join(" ");
        put("ggml.merges", Value::Texts(merges.iter().map(written).collect()));
    }
    let named = |name: &str| {
        let value = settings.get(name)?;
        let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
        id_of(file, settings, text)
    };
    let eos = chat.eos_ids();
    let ids = [
        ("bos", chat.bos_id()),
        ("eos", eos.first().copied()),
        ("eot", eos.get(1).copied()),
        ("unknown", named("unk_token")),
        ("padding", named("pad_token")),
    ];
    for (name, id) in ids.iter().filter_map(|(name, id)| Some((name, (*id)?))) {
        put(&format!("ggml.{name}_token_id"), Value::U32(id));
    }
    // What the tokenizer really puts around a text.
    let around = chat.encode("a", true)?;
    put("ggml.add_bos_token", Value::Bool(around.len() > 1 && around.first().copied() == chat.bos_id()));
    put("ggml.add_eos_token", Value::Bool(around.len() > 1 && around.last().is_some_and(|id| eos.contains(id))));
    if let Some(template) = chat.template() {
        put("chat_template", Value::Text(template.text.clone()));
    }
    Ok((metadata, remarks))
}

/// Pairs that are merged, the first one first.
fn merges(model: &Json) -> Result<Vec<[String; 2]>> {
    let list = model.get("merges").and_then(Json::as_array).map(Vec::as_slice).unwrap_or_default();
    let pair = |merge: &Json| match merge {
        Json::String(text) => text.split_once(' ').map(|(a, b)| [a.to_owned(), b.to_owned()]),
        Json::Array(parts) => match parts.as_slice() {
            [Json::String(a), Json::String(b)] => Some([a.clone(), b.clone()]),
            _ => None,
        },
        _ => None,
    };
    list.iter().map(|merge| pair(merge).ok_or_else(|| Error::input(format!("{merge} is no merge of two")))).collect()
}

/// Added tokens of both files: id, text, whether it is special.
fn added<'a>(file: &'a Json, settings: &'a Json) -> impl Iterator<Item = (usize, &'a str, bool)> {
    let of = |id: Option<usize>, token: &'a Json| {
        Some((id?, token.get("content")?.as_str()?, token.get("special").and_then(Json::as_bool) == Some(true)))
    };
    let own = file.get("added_tokens").and_then(Json::as_array).into_iter().flatten();
    let own = own.filter_map(move |token| of(token.get("id").and_then(Json::as_u64).map(|id| id as usize), token));
    let described = settings.get("added_tokens_decoder").and_then(Json::as_object).into_iter().flatten();
    own.chain(described.filter_map(move |(id, token)| of(id.parse().ok(), token)))
}

fn id_of(file: &Json, settings: &Json, text: &str) -> Option<u32> {
    let of_model = || file.get("model")?.get("vocab")?.get(text)?.as_u64().map(|id| id as u32);
    added(file, settings).find(|(_, own, _)| *own == text).map(|(id, ..)| id as u32).or_else(of_model)
}

fn tokens(file: &Json, settings: &Json, chat: &ChatTokenizer, rows: usize) -> Result<Tokens> {
    let mut texts: Vec<Option<String>> = vec![None; rows];
    let mut types = vec![UNUSED; rows];
    let mut place = |id: usize, text: &str, kind: i32| {
        let Some(to) = texts.get_mut(id) else {
            return Err(refused(format!("a tokenizer with more tokens than the model has: '{text}' is number {id}")));
        };
        (*to, types[id]) = (Some(text.to_owned()), kind);
        Ok(())
    };
    let vocabulary = file.get("model").and_then(|model| model.get("vocab")).and_then(Json::as_object);
    for (text, id) in vocabulary.into_iter().flatten() {
        place(id.as_u64().unwrap_or(u64::MAX) as usize, text, NORMAL)?;
    }
    for (id, text, special) in added(file, settings) {
        // llama.cpp looks for them in the text as it is.
        match special || looks_special(text) {
            true => place(id, text, CONTROL)?,
            false => place(id, &text.replace('▁', " "), USER_DEFINED)?,
        }
    }
    for id in (0..rows).filter(|id| texts[*id].is_none()).collect::<Vec<_>>() {
        // Special tokens that are only named get ids behind the others.
        match chat.token(id as u32) {
            Some(text) => (texts[id], types[id]) = (Some(text), CONTROL),
            None => texts[id] = Some(format!("[PAD{id}]")),
        }
    }
    Ok(Tokens { texts: texts.into_iter().flatten().collect(), types })
}

/// Tokens that some files do not call special, and llama.cpp's converter does (`does_token_look_special`).
fn looks_special(text: &str) -> bool {
    let between = |open: &str, close: &str| text.starts_with(open) && text.ends_with(close);
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&text)
        || between("<|", "|>")
        || between("<｜", "｜>")
        || between("<unused", ">")
}

fn refused(what: String) -> Error {
    Error::input(format!("{what}: no GGUF is written of it"))
        .help("merge into safetensors, and use llama.cpp's convert_hf_to_gguf.py")
}
