"""Everything that watches the server from outside, written from one source: names, rules, alerts and dashboards."""
