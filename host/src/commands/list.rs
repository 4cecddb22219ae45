//! `dpo-host list`: what was found, and where.

use clap::{Args, ValueEnum};
use serde_json::json;

use dpo_core::error::Result;
use dpo_plugin_api::ops::{OPS, OpSchema};
use dpo_plugins::{ListRow as Row, Registry};

#[derive(Args)]
pub(crate) struct ListOptions {
    /// Which kind; by default all plugins
    #[arg(value_enum, default_value_t = Kind::All)]
    kind: Kind,
    /// All published checkpoints that families are known to read, one a line, instead of the first of each
    #[arg(long)]
    all: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Families, formats and losses
    All,
    /// Model families
    #[value(alias = "plugins")]
    Models,
    /// Dataset formats
    Datasets,
    /// Losses
    Losses,
    /// Ops that graphs may name
    Ops,
}

pub(crate) fn list(registry: &Registry, options: &ListOptions) -> Result<()> {
    if options.kind == Kind::Ops {
        return ops(options.json);
    }
    let wanted = |kind: &str| match options.kind {
        Kind::Models => kind == "model",
        Kind::Datasets => kind == "dataset",
        Kind::Losses => kind == "loss",
        Kind::All | Kind::Ops => true,
    };
    let rows: Vec<_> = registry.rows.iter().filter(|r| wanted(r.kind)).collect();
    if options.json {
        println!("{:#}", json!({"plugins": rows, "refused": registry.refusals}));
        return Ok(());
    }
    if options.all {
        let of = |row: &&Row| row.checkpoints.iter().map(|name| [row.name.clone(), name.clone()]).collect::<Vec<_>>();
        print_table(["FAMILY", "CHECKPOINT"], rows.iter().filter(|r| r.shadowed_by.is_none()).flat_map(of).collect());
        return Ok(());
    }
    let (again, rows): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(|row| repeats(&rows, row));
    let table = rows.iter().map(|r| {
        let shadowed = r.shadowed_by.as_ref().map(|by| format!(" (not used: {by} comes first)")).unwrap_or_default();
        let origin = format!("{}{shadowed}", r.origin);
        [r.kind.to_owned(), r.name.clone(), r.version.clone(), r.claims.clone(), first(&r.checkpoints), origin]
    });
    print_table(["KIND", "NAME", "VERSION", "CLAIMS", "SUCH AS", "FROM"], table.collect());
    if let Some(row) = again.first() {
        let (count, by) = (again.len(), row.shadowed_by.as_deref().unwrap_or_default());
        println!(
            "{count} more are of the same versions and not used, such as {} (the one used: {by}); --json has them",
            row.origin
        );
    }
    for refusal in &registry.refusals {
        println!("refused  {}: {}", refusal.place, refusal.cause);
    }
    Ok(())
}

/// The first of some checkpoints, and how many more there are.
fn first(checkpoints: &[String]) -> String {
    match checkpoints {
        [] => String::new(),
        [one] => one.clone(),
        [one, more @ ..] => format!("{one} and {} more", more.len()),
    }
}

/// Whether the plugin that is used in place of this one is of the same package and version.
fn repeats(rows: &[&Row], row: &Row) -> bool {
    let same = |other: &&Row| {
        other.shadowed_by.is_none()
            && (other.kind, &other.name, &other.package, &other.version)
                == (row.kind, &row.name, &row.package, &row.version)
    };
    row.shadowed_by.is_some() && rows.iter().any(same)
}

fn ops(as_json: bool) -> Result<()> {
    let attrs = |op: &OpSchema| op.attrs.iter().map(|a| a.name).collect::<Vec<_>>();
    if as_json {
        let rows: Vec<_> =
            OPS.iter().map(|o| json!({"name": o.name, "formula": o.formula, "attributes": attrs(o)})).collect();
        println!("{:#}", json!(rows));
        return Ok(());
    }
    let rows = OPS.iter().map(|o| [o.name.to_owned(), attrs(o).join(", "), o.formula.to_owned()]);
    print_table(["OP", "ATTRIBUTES", "FORMULA"], rows.collect());
    Ok(())
}

/// Columns as wide as their widest cell, two spaces apart.
pub(crate) fn print_table<const N: usize>(head: [&str; N], rows: Vec<[String; N]>) {
    let width = |c: usize| rows.iter().map(|r| r[c].chars().count()).chain([head[c].len()]).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let print = |row: &[String; N]| {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, w)| format!("{cell:w$}")).collect();
        println!("{}", cells.join("  ").trim_end());
    };
    print(&head.map(str::to_owned));
    rows.iter().for_each(print);
}
