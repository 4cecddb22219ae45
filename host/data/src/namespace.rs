//! Namespaces of chat templates. One that holds itself has no end: whatever walks it overflows the stack, which ends the process. So a
//! namespace may have values, and be none: its name stands before a dot or a bracket alone. Published templates do nothing else.

use std::borrow::Cow;

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
        if !is_name || declares(index) || before(index, 1) == "." || is_parameter(&tokens, index) {
            continue;
        }
        if token == NAMESPACE && !names.contains(&NAMESPACE) || !matches!(at(index + 1), "." | "[" | "=") {
            return Err(Error::input(format!("the chat template uses the namespace '{token}' as a value"))
                .help("set and read values of a namespace, as in {% set ns = namespace(a=1) %}{{ ns.a }}; one that held itself had no end"));
        }
    }
    Ok(())
}

/// Whether the name is given to a macro whose parameter has the same name, or is that parameter: within the macro, too, it then stands before
/// a dot or a bracket alone.
fn is_parameter(tokens: &[String], index: usize) -> bool {
    let at = |index: usize| tokens.get(index).map_or("", String::as_str);
    let Some((callee, place)) = place_of(tokens, index) else { return false };
    let name = at(callee);
    // A macro is called by its own name alone, which nothing else has.
    let uses = || (0..tokens.len()).filter(|i| at(*i) == name);
    if uses().any(|i| at(i + 1) != "(") {
        return false;
    }
    let mut macros = uses().filter(|i| i.checked_sub(1).is_some_and(|before| at(before) == "macro")).peekable();
    macros.peek().is_some() && macros.all(|i| parameters(tokens, i + 2).get(place).is_some_and(|p| *p == at(index)))
}

/// What is called with the argument at `index`, and which of its arguments that is. `None` for what is no argument by its place.
fn place_of(tokens: &[String], index: usize) -> Option<(usize, usize)> {
    if !matches!(tokens.get(index + 1)?.as_str(), "," | ")") {
        return None;
    }
    let (mut depth, mut place) = (0usize, 0);
    for i in (0..index).rev() {
        match tokens[i].as_str() {
            ")" | "]" | "}" => depth += 1,
            "(" if depth == 0 => return Some((i.checked_sub(1)?, place)),
            "[" | "{" if depth == 0 => return None,
            "(" | "[" | "{" => depth -= 1,
            "," if depth == 0 => place += 1,
            // What stands right before it, as in `a or name`.
            _ if i + 1 == index => return None,
            _ => {}
        }
    }
    None
}

/// The parameters of a macro, from behind its bracket on.
fn parameters(tokens: &[String], first: usize) -> Vec<&str> {
    let (mut depth, mut names, mut new) = (0usize, Vec::new(), true);
    for token in tokens.iter().skip(first) {
        match token.as_str() {
            ")" if depth == 0 => break,
            "," if depth == 0 => new = true,
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            name if new => {
                names.push(name);
                new = false;
            }
            _ => {}
        }
    }
    names
}

/// The template with what `with` makes of every text in quotes between its brackets.
pub(super) fn with_texts(template: &str, with: impl Fn(&str) -> Result<Cow<'_, str>>) -> Result<String> {
    let (mut made, mut rest) = (String::with_capacity(template.len()), template);
    while let Some(at) = rest.find('{') {
        let (before, behind) = rest.split_at(at + 1);
        made += before;
        rest = behind;
        if let Some(comment) = rest.strip_prefix('#') {
            let length = comment.find("#}").map_or(rest.len(), |end| end + 3);
            made += &rest[..length];
            rest = &rest[length..];
        } else if let Some(end) = code_end(rest) {
            while let Some(first) = rest.chars().next().filter(|_| !rest.starts_with(end)) {
                let quoted = matches!(first, '\'' | '"');
                let (token, behind) = rest.split_at(if quoted { text(rest, first) } else { first.len_utf8() });
                made += &if quoted { with(token)? } else { token.into() };
                rest = behind;
            }
        }
    }
    Ok(made + rest)
}

/// How code ends that begins behind a brace.
fn code_end(behind: &str) -> Option<&'static str> {
    behind.strip_prefix('{').map(|_| "}}").or(behind.strip_prefix('%').map(|_| "%}"))
}

/// Names and signs between the brackets of a template, without texts in quotes and comments.
fn tokens(template: &str) -> Vec<String> {
    let (mut all, mut rest) = (Vec::new(), template);
    while let Some(at) = rest.find('{') {
        rest = &rest[at + 1..];
        if let Some(comment) = rest.strip_prefix('#') {
            rest = comment.split_once("#}").map_or("", |(_, behind)| behind);
        } else if let Some(end) = code_end(rest) {
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
            "{% macro m(a, ns, b=[1, (2)]) %}{% set ns.a = a %}{{ m(f(1, 2), ns) }}{% endmacro %}{% set ns = namespace() %}{{ m(1, ns) }}",
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
            "{% macro m(x) %}{% set x.a = x %}{% endmacro %}{% set ns = namespace() %}{{ m(ns) }}",
            "{% macro m(a, ns) %}{{ a }}{% endmacro %}{% set ns = namespace() %}{{ m(ns) }}",
            "{% macro m(ns) %}{% endmacro %}{% set f = m %}{% set ns = namespace() %}{{ m(ns) }}",
            "{% macro m(ns) %}{% set ns.a = [ns] %}{% endmacro %}{% set ns = namespace() %}{{ m(ns) }}",
            "{% macro m(ns) %}{% endmacro %}{% set ns = namespace() %}{{ m([ns]) }}",
            "{% macro m(ns) %}{% endmacro %}{% set ns = namespace() %}{{ m(a or ns) }}",
            "{% macro m(ns) %}{% endmacro %}{% set ns = namespace() %}{{ m(ns=ns) }}",
            "{% set ns = namespace() %}{{ dict(ns) }}",
        ];
        for template in hostile {
            assert!(refuse_as_value(template).is_err(), "{template}");
        }
    }
}
