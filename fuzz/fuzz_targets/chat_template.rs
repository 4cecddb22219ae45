//! A checkpoint's chat template: whatever it says, rendering two turns ends, and in bounded memory (libFuzzer's own limits
//! on time and memory are the check).
#![no_main]

use dpo_data::{ChatTemplate, Rendering};
use dpo_plugin_api::dataset::Message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let Ok(template) = ChatTemplate::from_text(text, serde_json::Map::new()) else { return };
    let turns = [Message::new("user", "Why?"), Message::new("assistant", "<b>Because</b>")];
    let _ = template.render(&turns, Rendering { generation_prompt: true, ..Rendering::default() });
});
