//! A plugin of each kind, built against plugin-api 1.0.0, that uses as much of it as it can.

use dpo_plugin_api::dataset::column;
use dpo_plugin_api::prelude::*;

/// A family with every op and every attribute of 1.0.0.
pub struct Family;

impl ModelFamily for Family {
    fn name(&self) -> &'static str {
        "frozen-family"
    }

    fn summary(&self) -> &'static str {
        "built against plugin-api 1.0.0"
    }

    fn claims(&self) -> &'static [&'static str] {
        &["FrozenForCausalLM"]
    }

    fn example_config(&self) -> &'static str {
        r#"{"architectures": ["FrozenForCausalLM"], "hidden_size": 32, "vocab_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "sliding_window": 6,
        "use_sliding_window": true, "max_window_layers": 2, "tie_word_embeddings": true, "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 16}}"#
    }

    fn chat_template(&self) -> Option<&'static str> {
        Some("{% for message in messages %}{{ message.content }}{% endfor %}")
    }

    fn graph(&self, config: &Config) -> Result<ModelGraph> {
        let (width, vocab, layers) =
            (config.int("hidden_size")?, config.int("vocab_size")?, config.int("num_hidden_layers")?);
        let (heads, kv_heads) = (config.int("num_attention_heads")?, config.int("num_key_value_heads")?);
        let (ffn, head_dim) = (config.int("intermediate_size")?, width / heads);
        let rope = Rope::from_config(config, head_dim, 10_000.0)?;
        let mut graph = GraphBuilder::decoder(width, vocab);
        graph.embed(|b, tokens| b.embedding("embed.weight", tokens, vocab, width));
        for (layer, window) in config.layer_windows(layers)?.into_iter().enumerate() {
            let name = if window.is_some() { "near" } else { "far" };
            let block = graph.block_once(name, |b, x| {
                let h = b.rms_norm("norm", x, 1e-6);
                let q = b.linear_bias("q", h, width);
                let k = b.linear("k", h, kv_heads * head_dim);
                let v = b.linear_if(false, "v", h, kv_heads * head_dim);
                let q = b.head_norm(Norm::rms(1e-5), "q_norm", q, head_dim);
                let (q, k) = (b.rope(q, head_dim, &rope), b.rope(k, head_dim, &rope));
                let attention = Attention::new(heads, kv_heads, head_dim).window(window);
                let attention = attention.scale(0.25).softcap(Some(30.0));
                let h = b.attention(q, k, v, attention);
                let x = b.add(x, h);
                let (gate, up) = (b.linear("gate", x, ffn), b.linear("up", x, ffn));
                let h = b.glu("gelu_tanh", gate, up);
                let h = b.linear("down", h, width);
                b.op("add", &[x, h], vec![], &[], width)
            });
            graph.layer(block, format!("layers.{layer}."));
        }
        let head = config.head_tensor("embed.weight", false)?;
        graph.head(|b, x| b.lm_head(head, x, vocab));
        graph.unused_tensor("layers.*.inv_freq");
        graph.rope_limit(&rope);
        graph.finish(config)
    }
}

/// A format of conversations with tools, of pairs, single answers and rankings.
pub struct Format;

impl DatasetFormat for Format {
    fn name(&self) -> &'static str {
        "frozen-format"
    }

    fn summary(&self) -> &'static str {
        "built against plugin-api 1.0.0"
    }

    fn examples(&self) -> &'static str {
        r#"{"frozen": [{"from": "human", "value": "2+2"}], "good": "4", "bad": "5", "tools": [{"name": "add"}]}
{"frozen": [{"from": "human", "value": "2+2"}], "good": "4"}
{"frozen": [{"from": "human", "value": "2+2"}], "good": "4", "scored": {"5": 0.5, "four": 0.9, "fish": -1}}"#
    }

    fn recognises(&self, row: &Row) -> u8 {
        if row.contains_key("frozen") { 2 } else { 0 }
    }

    fn records(&self, row: &Row) -> Result<Vec<Record>> {
        let prompt = Text::Messages(Message::parse_list(column(row, "frozen")?)?);
        let plain = |key: &str| match row.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(Text::Plain(text.clone()))),
            Some(other) => Err(Error::new(format!("column '{key}' is {other}")).help("write a text")),
        };
        let Some(good) = plain("good")? else { return bail!("column 'good' is missing") };
        let mut record = match plain("bad")? {
            Some(bad) => Record::pair(prompt, good, bad),
            None => Record::liked(prompt, good, true),
        };
        if let Some(Value::Object(scores)) = row.get("scored") {
            let scored = scores.iter().filter_map(|(text, score)| Some((Text::Plain(text.clone()), score.as_f64()?)));
            record = Record::scored(record.prompt, scored.collect());
            record.answers.push(RecordAnswer { text: Text::Plain("another's".into()), label: 0.0, detached: true });
        }
        record.tools = row.get("tools").cloned();
        record.template_args.insert("enable_thinking".into(), json!(false));
        Ok(vec![record])
    }
}

/// A loss with every kind of need, option and state: logistic, shifted by the mean of the margins seen so far.
pub struct Loss;

impl AlignmentLoss for Loss {
    fn name(&self) -> &'static str {
        "frozen-loss"
    }

    fn summary(&self) -> &'static str {
        "built against plugin-api 1.0.0"
    }

    fn formula(&self) -> &'static str {
        "-log sigmoid(beta (ratio of the best - ratio of the worst) - state) - sum of statistics"
    }

    fn needs(&self) -> Needs {
        let statistics = vec!["log_sum_sq_probs".into()];
        Needs { answers: Answers::Ranked, whole_batch: true, statistics, ..Needs::default() }
    }

    fn options(&self) -> Vec<LossOption> {
        vec![LossOption::new("beta", 0.1, "strength"), LossOption::new("sign", "plus", "plus or minus")]
    }

    fn eval(&self, batch: &LossBatch<'_>, options: &Options, state: &mut Vec<f64>) -> Result<LossGrad> {
        let beta = match options.text("sign")? {
            "plus" => options.float("beta")?,
            "minus" => -options.float("beta")?,
            other => return bail!("unknown sign '{other}'"),
        };
        let shift = state.first().copied().unwrap_or(0.0);
        let sum = |values: &[f32]| values.iter().map(|s| f64::from(*s)).sum::<f64>();
        let extra = |e: &Example<'_>| sum(e.answers[0].statistics[0]) - sum(e.answers[0].reference_statistics[0]);
        let margin = |e: &Example<'_>| beta * (e.ratio(0) - e.ratio(e.learned() - 1));
        let seen = batch.examples.iter().map(|e| margin(e).value).sum::<f64>() / batch.totals.examples;
        *state = vec![shift + seen];
        Ok(batch.each_example(|e| -(margin(e) - shift).log_sigmoid() - extra(e)))
    }
}

plugin! { models: [Family], datasets: [Format], losses: [Loss] }
