//! Chat templates: from messages to the text a model was trained on.

use minijinja::{
    Environment, Error, ErrorKind, State, Value, context,
    value::{Rest, ValueKind},
};
use serde_json::ser::{Formatter, Serializer};

/// Name of the only template in the environment.
const NAME: &str = "chat";

/// A message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// Why a template could not be read or rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template refuses the messages in its own words (`raise_exception`).
    #[error("the model's chat template refuses the messages: {0}")]
    Refused(String),
    /// The template is no valid Jinja, or uses what is not there.
    #[error("the model's chat template failed: {0}; use a model with another template, or send a plain prompt")]
    Failed(String),
}

/// The Jinja template of a model file, in the dialect of Hugging Face's tokenizers: blocks are trimmed, strings have
/// Python's common methods, and `raise_exception`, `strftime_now` and `tojson` are there.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    pub(crate) fn new(source: &str, bos: &str, eos: &str) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(python_method);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message).with_source(Refusal))
        });
        // Empty: a prompt that changes with the date would share no prefix with yesterday's.
        environment.add_function("strftime_now", |_: Rest<Value>| String::new());
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| failed(&error))?;
        Ok(Self {
            environment,
            bos: bos.to_owned(),
            eos: eos.to_owned(),
        })
    }

    /// The prompt of `messages`; with `add_generation_prompt`, up to where the assistant speaks.
    ///
    /// # Errors
    /// [`TemplateError`] if the template refuses the messages or fails.
    pub fn render(&self, messages: &[ChatMessage], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|message| context! { role => message.role, content => message.content })
            .collect();
        let context = context! {
            messages,
            add_generation_prompt,
            bos_token => self.bos,
            eos_token => self.eos,
        };
        let template = self.environment.get_template(NAME).map_err(|error| failed(&error))?;
        template.render(context).map_err(|error| failed(&error))
    }
}

/// Marks errors that the template raised itself.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Refusal;

fn failed(error: &Error) -> TemplateError {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if inner.is::<Refusal>() {
            return TemplateError::Refused(error.detail().unwrap_or("no reason given").to_owned());
        }
        source = inner.source();
    }
    TemplateError::Failed(error.to_string())
}

/// The methods of Python's strings and dictionaries that templates call.
fn python_method(_: &State<'_, '_>, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let unknown = || {
        Error::new(
            ErrorKind::UnknownMethod,
            format!("{} has no method {method}", value.kind()),
        )
    };
    if value.kind() == ValueKind::Map {
        let items = || {
            value
                .try_iter()
                .map(|keys| keys.map(|key| (key.clone(), value.get_item(&key).unwrap_or_default())))
        };
        return match (method, args) {
            ("items", []) => Ok(items()?.map(|(key, item)| Value::from(vec![key, item])).collect()),
            ("keys", []) => Ok(items()?.map(|(key, _)| key).collect()),
            ("values", []) => Ok(items()?.map(|(_, item)| item).collect()),
            ("get", [key]) => value.get_item(key),
            ("get", [key, default]) => value
                .get_item(key)
                .map(|item| if item.is_undefined() { default.clone() } else { item }),
            _ => Err(unknown()),
        };
    }
    let text = value.as_str().ok_or_else(unknown)?;
    let strings = || {
        args.iter()
            .map(|arg| arg.as_str().ok_or_else(unknown))
            .collect::<Result<Vec<_>, _>>()
    };
    let set = |set: &str| {
        let set = set.to_owned();
        move |c: char| set.contains(c)
    };
    Ok(match (method, &strings()?[..]) {
        ("strip", []) => text.trim().into(),
        ("strip", [chars]) => text.trim_matches(set(chars)).into(),
        ("lstrip", []) => text.trim_start().into(),
        ("lstrip", [chars]) => text.trim_start_matches(set(chars)).into(),
        ("rstrip", []) => text.trim_end().into(),
        ("rstrip", [chars]) => text.trim_end_matches(set(chars)).into(),
        ("startswith", [prefix]) => text.starts_with(prefix).into(),
        ("endswith", [suffix]) => text.ends_with(suffix).into(),
        ("upper", []) => text.to_uppercase().into(),
        ("lower", []) => text.to_lowercase().into(),
        ("replace", [from, to]) => text.replace(from, to).into(),
        ("split", []) => text.split_whitespace().map(Value::from).collect(),
        ("split", [separator]) if !separator.is_empty() => text.split(separator).map(Value::from).collect(),
        _ => return Err(unknown()),
    })
}

/// JSON as Python writes it: a space after commas and colons.
fn to_json(value: Value) -> Result<String, Error> {
    let mut json = Vec::new();
    serde::Serialize::serialize(&value, &mut Serializer::with_formatter(&mut json, Spaced))
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))?;
    String::from_utf8(json).map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> ChatMessage {
        ChatMessage {
            role: role.to_owned(),
            content: content.to_owned(),
        }
    }

    fn render(source: &str) -> Result<String, TemplateError> {
        ChatTemplate::new(source, "<s>", "</s>")?.render(&[message("user", " Hi "), message("assistant", "Ho")], true)
    }

    #[test]
    fn the_dialect_of_tokenizers() {
        let table = [
            (
                "{% for m in messages %}\n  {% if true %}\n{{ m.role }}\n  {% endif %}\n{% endfor %}",
                "user\nassistant\n",
            ),
            (
                "{{ bos_token }}{{ messages[0]['content'].strip() }}{{ eos_token }}",
                "<s>Hi</s>",
            ),
            ("{% if add_generation_prompt %}>{% endif %}", ">"),
            ("{% if tools is defined %}t{% else %}-{% endif %}", "-"),
            (
                "{{ messages[1] | tojson }}",
                r#"{"role": "assistant", "content": "Ho"}"#,
            ),
            ("{{ [1, 'a\"b', none] | tojson }}", r#"[1, "a\"b", null]"#),
            ("{{ strftime_now('%d %b %Y') }}.", "."),
            (
                "{{ 'a,b'.split(',')[1] }}{{ 'xax'.strip('x') }}{{ 'ab'.startswith('a') }}",
                "baTrue",
            ),
            (
                "{% for k, v in messages[1].items() %}{{ k }}={{ v }};{% endfor %}",
                "role=assistant;content=Ho;",
            ),
            (
                "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
                "user",
            ),
            ("{{ messages[-1].content }}{{ messages[1:] | length }}", "Ho1"),
            ("{%- set ns = namespace(x=1) -%}{% set ns.x = 2 %}{{ ns.x }}", "2"),
        ];
        for (source, expected) in table {
            assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
        }
    }

    #[test]
    fn refusals_and_failures_are_told_apart() {
        assert_eq!(
            render("{{ raise_exception('roles must alternate') }}"),
            Err(TemplateError::Refused("roles must alternate".to_owned()))
        );
        for (source, expected) in [
            ("{% for %}", "syntax error"),
            ("{{ nothing() }}", "nothing"),
            ("{{ 'a'.fly() }}", "fly"),
        ] {
            let error = render(source).expect_err(source);
            assert!(
                matches!(&error, TemplateError::Failed(text) if text.contains(expected)),
                "{error}"
            );
        }
    }
}
