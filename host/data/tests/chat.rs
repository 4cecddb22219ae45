//! Renderings against transformers' own: `golden/chat.json`, made by `tests/oracle/render_chat.py`.
#![allow(clippy::unwrap_used)] // In a test, a panic is the report.

use std::time::{Duration, Instant};

use dpo_data::{ChatTemplate, Rendering};
use dpo_plugin_api::dataset::Message;
use serde_json::{Map, Value, json};

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/chat.json")).unwrap()
}

fn template(name: &str) -> ChatTemplate {
    let template = golden()["templates"][name].clone();
    ChatTemplate::from_text(template["text"].as_str().unwrap(), template["special_tokens"].as_object().unwrap().clone())
        .unwrap()
}

fn render(text: &str, messages: &[Message]) -> Result<String, String> {
    let template = ChatTemplate::from_text(text, Map::new()).map_err(|e| e.to_string())?;
    template.render(messages, Rendering::default()).map_err(|e| e.to_string())
}

#[test]
fn equal_to_transformers_byte_for_byte() {
    let cases = golden()["cases"].as_array().unwrap().clone();
    assert!(cases.len() >= 38);
    for (i, case) in cases.iter().enumerate() {
        let messages = Message::parse_list(&case["messages"]).unwrap();
        let with = Rendering {
            tools: Some(&case["tools"]).filter(|t| !t.is_null()),
            args: case["args"].as_object(),
            generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
        };
        let name = case["template"].as_str().unwrap();
        let text = template(name).render(&messages, with).unwrap_or_else(|e| panic!("case {i}, {name}: {e}"));
        assert_eq!(text, case["text"].as_str().unwrap(), "case {i}, {name}");
    }
}

#[test]
fn arguments_written_as_text_are_an_object_where_the_template_dumps_them() {
    let turns = |arguments: Value| {
        let call = json!([{"type": "function", "function": {"name": "f", "arguments": arguments}}]);
        Message::parse_list(&json!([{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": call}]))
            .unwrap()
    };
    let render = |name: &str, arguments| template(name).render(&turns(arguments), Rendering::default()).unwrap();
    let (object, text) = (json!({"a": 1, "b": "<"}), json!("{\"a\":1,\"b\":\"<\"}"));
    assert_eq!(render("qwen2.5", text.clone()), render("qwen2.5", object));
    // Qwen3 prints such text as it is, and so does transformers.
    assert!(render("qwen3", text).contains(r#""arguments": {"a":1,"b":"<"}}"#));
}

#[test]
fn a_refusal_says_what_the_template_says() {
    let turns = [Message::new("assistant", "hi")];
    let error = render("{{ raise_exception('roles must alternate') }}", &turns).unwrap_err();
    assert!(error.starts_with("the chat template refuses the conversation: roles must alternate"), "{error}");
}

#[test]
fn a_broken_template_names_its_line() {
    let error = render("{% if a %}\n{% endfor %}", &[]).unwrap_err();
    assert!(error.contains("cannot be read in line 2"), "{error}");
}

#[test]
fn the_folder_of_a_checkpoint_is_searched_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let said = |tools: Option<&Value>| {
        let template = ChatTemplate::find(dir.path(), Some("family")).unwrap().unwrap();
        template.render(&[], Rendering { tools, ..Rendering::default() }).unwrap()
    };
    assert!(ChatTemplate::find(dir.path(), None).unwrap().is_none());
    assert_eq!(said(None), "family");
    write("chat_template.json", r#"{"chat_template": "file"}"#);
    assert_eq!(said(None), "file");
    let list =
        r#"[{"name": "default", "template": "{{ bos_token }}config"}, {"name": "tool_use", "template": "tools"}]"#;
    write("tokenizer_config.json", &format!(r#"{{"bos_token": {{"content": "<s>"}}, "chat_template": {list}}}"#));
    assert_eq!(said(None), "<s>config");
    assert_eq!(said(Some(&json!([{"name": "f"}]))), "tools");
    write("chat_template.jinja", "jinja\n");
    assert_eq!(said(None), "jinja");
}

/// What such a template would do without limits: run for days, fill the memory, overflow the stack. All of it costs fuel, so
/// that a row is refused alike on every machine.
#[test]
fn a_hostile_template_is_stopped() {
    let count = "{% for a in range(10000) %}{% for b in range(10000) %}{% for c in range(10000) %}";
    let ends = "{% endfor %}".repeat(3);
    let namespace = "{% set n = namespace(a='x', b='x') %}";
    let doubled = format!("{namespace}{{% for i in range(60) %}}{{% set n.a = [n.a, n.a] %}}{{% endfor %}}");
    let templates = [
        format!("{count}{ends}"),
        format!("{count}{{{{ a }}}}{ends}"),
        format!("{namespace}{count}{{% set n.a = n.a ~ n.a %}}{ends}"),
        format!("{namespace}{count}{{% set n.a = n.a + n.a %}}{ends}"),
        format!("{namespace}{count}{{% set n.a = [n.a] %}}{ends}"),
        format!("{namespace}{count}{{% set n.a = [n.a, n.a] %}}{{{{ n.a }}}}{ends}"),
        format!("{namespace}{count}{{% set b %}}{{{{ n.a }}}}{{{{ n.a }}}}{{% endset %}}{{% set n.a = b %}}{ends}"),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".to_owned(),
        "{{ 'x' * 10000000000 }}".to_owned(),
        "{{ ([1] * 1000000000000)|list }}".to_owned(),
        "{{ range(1000000000000)|list }}".to_owned(),
        "{{ [1]|batch(1000000000, 'x')|list }}".to_owned(),
        "{{ [1]|slice(1000000000)|list }}".to_owned(),
        "{{ 'a\nb'|indent(10000000000) }}".to_owned(),
        "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}".to_owned(),
        "{{ ('x' * 1000000)|replace('x', 'y' * 1000000) }}".to_owned(),
        "{{ ('x' * 1000000).join(range(100000)) }}".to_owned(),
        "{{ '{:>100000000000}'.format('a') }}".to_owned(),
        "{{ '{:.1000000000f}'.format(1.5) }}".to_owned(),
        "{{ '{:99999999999999999999999999}'.format(1) }}".to_owned(),
        "{% set a = 'x' * 1000000 %}{{ ('{0}' * 1000000).format(a) }}".to_owned(),
        "{{ '%100000000000s'|format('a') }}".to_owned(),
        "{{ [1, 2, 3]|tojson(separators=['x' * 10000000, ':']) }}".to_owned(),
        "{{ (range(100000)|list)|tojson(separators=['x' * 1000000, ':']) }}".to_owned(),
        "{{ {'a': 1, 'b': 2, 'c': 3}|tojson(separators=[',', 'x' * 10000000]) }}".to_owned(),
        format!("{doubled}{{{{ debug() }}}}"),
        format!("{doubled}{{{{ n.a|chain(n.a) }}}}"),
    ]
    .into_iter()
    .chain(
        [
            "{{ n.a }}",
            "{{ n.a|tojson }}",
            "{{ n.a|string }}",
            "{{ n.a|pprint }}",
            "{{ [n.a]|map('string')|list }}",
            "{{ '{}'.format(n.a) }}",
            "{{ '{a}'.format(a=n.a) }}",
            "{{ ','.join([n.a]) }}",
            "{{ raise_exception(n.a) }}",
            "{{ strftime_now(n.a) }}",
        ]
        .map(|end| format!("{doubled}{end}")),
    );
    for text in templates {
        let started = Instant::now();
        let answer = render(&text, &[Message::new("user", "hi")]);
        assert!(answer.as_ref().is_err_and(|e| e.starts_with("the chat template refuses")), "{text}: {answer:?}");
        assert!(started.elapsed() < Duration::from_secs(10), "{text}: {:?}", started.elapsed());
    }
    let indented = render("{{ [[1]] | tojson(indent=1000000000) }}", &[]).unwrap();
    assert!(indented.len() < 200, "{}", indented.len());
    let said = render("{{ raise_exception('x' * 1000000) }}", &[]).unwrap_err();
    assert!(said.len() < 1000, "{}", said.len());
}

/// Expressions are compiled by recursion, over any number of operators.
#[test]
fn a_long_expression_does_not_overflow_the_stack() {
    for (before, link, after) in
        [("", "a+", "a"), ("", "a~", "a"), ("a", ".a", ""), ("a", "|e", ""), ("a", "()", ""), ("a", "[0]", "")]
    {
        // Operators are compiled in quadratic time.
        let count = if after.is_empty() { 40_000 } else { 8_000 };
        let _ = render(&format!("{{{{ {before}{}{after} }}}}", link.repeat(count)), &[]);
    }
    let _ = render(&format!("{{% if a %}}{}{{% endif %}}", "{%elif a%}".repeat(13_000)), &[]);
    let error = render(&"x".repeat(1 << 20), &[]).unwrap_err();
    assert!(error.contains("the chat template has 1048576 bytes, more than 131072"), "{error}");
}

/// What jinja2 takes and is refused here, with a word.
const REFUSED: [&str; 21] = [
    "words|first is callable",
    "|wordcount",
    "|urlencode",
    "|striptags",
    "|truncate",
    "|center",
    "|wordwrap",
    "|pprint",
    "|attr",
    ".isdecimal()",
    ".expandtabs(",
    ".casefold()",
    ".encode()",
    "\\N{BULLET}",
    "{{ namespace(a=1).a }}",
    "joiner",
    "cycler",
    "varargs",
    "autoescape",
    "' % ",
    "{{ +1 }}",
];

/// What is taken here, where Python compares no such values, or has no loop over them.
const TAKEN: [&str; 6] =
    ["|sum(attribute='v')", "|dictsort(by='value')", "1 < 'a'", "none < 1", "list is lt 3", "{% for x in none %}"];

/// jinja2's answers to small templates: `golden/jinja.json`, made by `tests/oracle/jinja.py`.
#[test]
fn small_templates_give_what_jinja_gives() {
    let golden: Value = serde_json::from_str(include_str!("golden/jinja.json")).unwrap();
    let mut other = Vec::new();
    for case in golden["cases"].as_array().unwrap() {
        let text = case[0].as_str().unwrap();
        let with = Rendering { args: golden["variables"].as_object(), ..Rendering::default() };
        let made = ChatTemplate::from_text(text, Map::new()).and_then(|t| t.render(&[], with));
        let known = |list: &[&str]| list.iter().any(|part| text.contains(part));
        let as_expected = match (case[1].as_str(), &made) {
            (Some(expected), Ok(made)) => expected == made,
            (Some(_), Err(_)) => known(&REFUSED),
            (None, Ok(_)) => known(&TAKEN),
            (None, Err(_)) => true,
        };
        if !as_expected {
            other.push(format!("{text}: {} is {made:?}", case[1]));
        }
    }
    assert!(other.is_empty(), "{} of jinja2's are other here:\n{}", other.len(), other.join("\n"));
}

/// A template that only takes objects gets them, one that only joins texts gets the text, and one that asks is given what the row has.
#[test]
fn arguments_are_what_the_template_takes() {
    let call = json!([{"type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}}]);
    let turns = Message::parse_list(&json!([{"role": "assistant", "tool_calls": call}])).unwrap();
    let with = |body: &str| {
        let text = format!(
            "{{% for m in messages %}}{{% set arguments = m.tool_calls[0].function.arguments %}}{body}{{% endfor %}}"
        );
        render(&text, &turns).unwrap()
    };
    assert_eq!(with("{{ arguments|tojson }}"), r#"{"a": 1}"#);
    assert_eq!(with("{% for k, v in arguments.items() %}{{ k }}{{ v }}{% endfor %}"), "a1");
    assert_eq!(with("{{ 'x' + arguments }}"), r#"x{"a":1}"#);
    assert_eq!(
        with("{% if arguments is not string %}{{ arguments|tojson }}{% else %}{{ arguments }}{% endif %}"),
        r#"{"a":1}"#
    );
    let demands = "{% if arguments is string %}{{ raise_exception('an object') }}{% endif %}{{ arguments|tojson }}";
    assert_eq!(with(demands), r#"{"a": 1}"#);
}
