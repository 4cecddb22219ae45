//! A `Modelfile` for ollama: the file, the chat template in ollama's own language, and the texts that end an answer.
//!
//! ollama does not run the chat template of a GGUF. Its own is written from what that one makes of a conversation: what is before and behind each
//! turn. Where turns are made in another way, as by what came before them, none is written, and the user hears of it.

use dpo_core::console::Remark;
use dpo_data::chat::Rendering;
use dpo_data::tokens::ChatTokenizer;
use dpo_plugin_api::dataset::Message;

/// What is said of a file.
pub(crate) struct Modelfile {
    template: Option<Turns>,
    stops: Vec<String>,
    pub(crate) remarks: Vec<Remark>,
}

/// What is around the turns of a conversation.
#[derive(Clone, Debug, PartialEq)]
struct Turns {
    /// None where conversations have no such turn.
    system: Option<[String; 2]>,
    user: [String; 2],
    assistant: [String; 2],
    /// The system's turn where a conversation has none.
    usual: Option<String>,
}

/// What ollama is told of a tokenizer's model.
pub(crate) fn of(chat: &ChatTokenizer) -> Modelfile {
    let stops = chat.eos_ids().iter().filter_map(|id| chat.token(*id)).collect();
    let template = turns(chat);
    let remarks = match (&template, chat.template()) {
        (None, Some(_)) => vec![
            Remark::from("the chat template does more than put texts around turns: the Modelfile has none")
                .help("write TEMPLATE into it, or run the file in llama.cpp, which takes the chat template itself"),
        ],
        _ => Vec::new(),
    };
    Modelfile { template, stops, remarks }
}

impl Modelfile {
    pub(crate) fn text(&self, file: &str) -> String {
        let mut text = format!("FROM ./{file}\n");
        if let Some(turns) = &self.template {
            text += &format!("TEMPLATE \"\"\"{}\"\"\"\n", turns.template());
            if let Some(usual) = &turns.usual {
                text += &format!("SYSTEM \"\"\"{usual}\"\"\"\n");
            }
        }
        for stop in &self.stops {
            text += &format!("PARAMETER stop {stop:?}\n");
        }
        text
    }
}

impl Turns {
    /// In the language of Go's templates, as ollama runs it for every turn of a user and the answer.
    fn template(&self) -> String {
        let turn = |name: &str, [before, behind]: &[String; 2]| {
            format!("{{{{ if .{name} }}}}{before}{{{{ .{name} }}}}{behind}{{{{ end }}}}")
        };
        let [before, behind] = &self.assistant;
        let system = self.system.as_ref().map(|around| turn("System", around)).unwrap_or_default();
        system + &turn("Prompt", &self.user) + before + "{{ .Response }}" + behind
    }

    /// A conversation.
    fn text(&self, system: Option<&str>, turns: &[[&str; 2]], last: &str) -> String {
        let turn = |[before, behind]: &[String; 2], text: &str| format!("{before}{text}{behind}");
        let mut all = system.zip(self.system.as_ref()).map(|(text, around)| turn(around, text)).unwrap_or_default();
        for [user, assistant] in turns {
            all += &(turn(&self.user, user) + &turn(&self.assistant, assistant));
        }
        all + &turn(&self.user, last) + &self.assistant[0]
    }
}

/// Texts that no template has.
const SYSTEM: &str = "sys7tem";
const USERS: [&str; 2] = ["us7er1", "us7er2"];
const ANSWER: &str = "ans7wer";

/// What is around turns, if that is all that the template does.
fn turns(chat: &ChatTokenizer) -> Option<Turns> {
    if chat.template()?.reads_clock {
        return None;
    }
    let bos = chat.bos_id().and_then(|id| chat.token(id));
    let adds_bos = chat.encode("a", true).ok()?.first().copied() == chat.bos_id();
    let render = |turns: &[(&str, &str)], generation_prompt: bool| {
        let turns: Vec<Message> = turns.iter().map(|(role, text)| Message::new(role, *text)).collect();
        let text = chat.render(&turns, Rendering { generation_prompt, ..Rendering::default() }).ok()?;
        // ollama puts the token before a text that the tokenizer does.
        let bos = bos.as_deref().filter(|_| adds_bos);
        Some(bos.and_then(|bos| text.strip_prefix(bos)).map_or(text.clone(), str::to_owned))
    };
    let behind = |text: &str, at: &str| text.split_once(at).map(|(_, rest)| rest.to_owned());
    let before = |text: &str, at: &str| text.split_once(at).map(|(front, _)| front.to_owned());
    let (user, answer) = (("user", USERS[0]), ("assistant", ANSWER));
    let conversation = [user, answer, ("user", USERS[1])];
    let all = render(&conversation, true)?;
    let behind_user = behind(&render(&[user], false)?, USERS[0])?;
    let behind_answer = behind(&render(&[user, answer], false)?, ANSWER)?;
    let before_answer = behind(&render(&[user], true)?, USERS[0])?.strip_prefix(&behind_user)?.to_owned();
    let between = before(&behind(&all, ANSWER)?, USERS[1])?;
    let before_user = between.strip_prefix(&behind_answer)?.to_owned();
    let usual = before(&all, USERS[0])?.strip_suffix(&before_user)?.to_owned();
    let mut turns = Turns {
        system: None,
        user: [before_user, behind_user],
        assistant: [before_answer, behind_answer],
        usual: None,
    };
    let with_system = [&[("system", SYSTEM)][..], &conversation].concat();
    if let Some(with) = render(&with_system, true) {
        let front = before(&with, SYSTEM)?;
        let back = before(&behind(&with, SYSTEM)?, USERS[0])?.strip_suffix(&turns.user[0])?.to_owned();
        let inner = usual.strip_prefix(&front).and_then(|rest| rest.strip_suffix(&back));
        turns.usual = inner.map(str::to_owned);
        turns.system = Some([front, back]);
        if turns.text(Some(SYSTEM), &[[USERS[0], ANSWER]], USERS[1]) != with {
            return None;
        }
    }
    let parts = [Some(&turns.user), Some(&turns.assistant), turns.system.as_ref()].into_iter().flatten().flatten();
    let parts = parts.chain(&turns.usual);
    let is_plain = parts.into_iter().all(|text: &String| !text.contains("{{") && !text.contains("\"\"\""));
    let made = turns.text(turns.usual.as_deref(), &[[USERS[0], ANSWER]], USERS[1]);
    (made == all && is_plain).then_some(turns)
}
