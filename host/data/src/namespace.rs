//! Namespaces of chat templates. One that holds itself has no end: whatever walks it overflows the stack, which ends the process. So a
//! namespace may have values, and be none: its name stands before a dot or a bracket alone. Published templates do nothing else.

use dpo_core::error::{Error, Result};

const NAMESPACE: &str = "namespace";

/// Refuses a template that uses a namespace as a value.
pub(super) fn refuse_as_value(template: &str) -> Result<()> {
    let tokens = tokens(template);
    let at = |index: usize| tokens.get(index).map_or("", String::as_str);
    let before = |index: usize, back: usize| index.checked_sub(back).map_or("", at);
    let declares = |index: usize| {
        at(index) == NAMESPACE && at(index + 1) == "(" && before(index, 1) == "=" && before(index, 3) == "set"
    };
    let names: Vec<&str> = (0..tokens.len()).filter(|i| declares(*i)).map(|i| before(i, 2)).collect();
    for (index, token) in tokens.iter().enumerate() {
        let is_name = names.contains(&token.as_str()) || token == NAMESPACE;
        if !is_name || declares(index) || before(index, 1) == "." {
            continue;
        }
        if token == NAMESPACE && !names.contains(&NAMESPACE) || !matches!(at(index + 1), "." | "[" | "=") {
            return Err(Error::input(format!("the chat template uses the namespace '{token}' as a value"))
                .help("set and read values of a namespace, as in {% set ns = namespace(a=1) %}{{ ns.a }}; one that held itself had no end"));
        }
    }
    Ok(())
}

/// Names and signs between the brackets of a template, without texts in quotes and comments.
fn tokens(template: &str) -> Vec<String> {
    let (mut all, mut rest) = (Vec::new(), template);
    while let Some(at) = rest.find('{') {
        rest = &rest[at + 1..];
        if let Some(comment) = rest.strip_prefix('#') {
            rest = comment.split_once("#}").map_or("", |(_, behind)| behind);
        } else if let Some(end) = rest.strip_prefix('{').map(|_| "}}").or(rest.strip_prefix('%').map(|_| "%}")) {
            rest = code(&rest[1..], end, &mut all);
        }
    }
    all
}

/// The tokens of code up to its end; what is behind it.
fn code<'a>(mut rest: &'a str, end: &str, all: &mut Vec<String>) -> &'a str {
    while let Some(first) = rest.chars().next() {
        if let Some(behind) = rest.strip_prefix(end) {
            return behind;
        }
        let length = match first {
            '\'' | '"' => text(rest, first),
            c if c.is_alphanumeric() || c == '_' => {
                let length = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                all.push(rest[..length].to_owned());
                length
            }
            c if c.is_whitespace() => c.len_utf8(),
            // Compared is not assigned.
            _ if rest.starts_with("==") => {
                all.push("==".into());
                2
            }
            c => {
                all.push(c.to_string());
                c.len_utf8()
            }
        };
        rest = &rest[length..];
    }
    rest
}

/// Bytes of a text in quotes.
fn text(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // In a test, a panic is the report.

    use super::*;

    #[test]
    fn a_namespace_is_no_value() {
        let sound = [
            "{%- set ns = namespace(found=false, last=messages|length - 1) %}{% set ns.found = true %}{{ ns.found }}",
            "{% set ns = namespace() %}{{ 'ns' ~ \"it's ns\" }}{# ns #} ns {{ message.ns }}{% if ns['a'] == 1 %}{% endif %}",
            "{%set namespace = namespace(a=1)%}{{ namespace.a }}",
        ];
        sound.iter().for_each(|template| refuse_as_value(template).unwrap());
        let hostile = [
            "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
            "{% set ns = namespace() %}{% set ns.a = [ns] %}",
            "{% set ns = namespace(a=namespace()) %}",
            "{% set f = namespace %}{% set ns = f() %}{% set ns.a = ns %}",
            "{% for ns in [namespace()] %}{% set ns.a = ns %}{{ ns.a|tojson }}{% endfor %}",
            "{% set a, b = namespace(), 1 %}{% set a.x = a %}",
            "{% set ns = namespace() %}{% set m = {'k': ns} %}{% set ns.a = m %}",
            "{% set ns = namespace() %}{{ ns == ns }}",
            "{%set ns=namespace()%}{%set ns.a=ns%}",
        ];
        for template in hostile {
            assert!(refuse_as_value(template).is_err(), "{template}");
        }
    }
}
