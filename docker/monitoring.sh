#!/usr/bin/env bash
# Prometheus and Alertmanager as they are installed (Debian: prometheus prometheus-alertmanager), on the rendered files,
# beside a server that runs already. `make monitoring` calls it; it ends with Ctrl-C and takes both with it.
#
#   SERVER=127.0.0.1:8000   PROMETHEUS=127.0.0.1:9090   ALERTMANAGER=127.0.0.1:9093
#   LORADOCK_KEY=...        a key that may read /metrics and roll back; a server without keys needs none
#   CONFIG=loradock.yaml    the server's own configuration, for its SLOs
#   OUT=.monitoring         where files and data are kept
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for program in prometheus prometheus-alertmanager; do
    command -v "$program" >/dev/null || {
        echo "monitoring.sh: $program is not installed; on Debian and Ubuntu: apt-get install prometheus prometheus-alertmanager" >&2
        exit 1
    }
done

out=${OUT:-.monitoring}
prometheus=${PROMETHEUS:-127.0.0.1:9090}
alertmanager=${ALERTMANAGER:-127.0.0.1:9093}
.venv/bin/loradock monitoring render --out "$out" ${CONFIG:+--config "$CONFIG"} \
    --server "${SERVER:-127.0.0.1:8000}" --prometheus "$prometheus" --alertmanager "$alertmanager"
(umask 077 && printf '%s' "${LORADOCK_KEY:-none}" | tee "$out/prometheus/scrape-key" >"$out/alertmanager/alert-key")

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
trap 'exit 0' INT TERM
prometheus --config.file="$out/prometheus/prometheus.yml" --storage.tsdb.path="$out/data/prometheus" \
    --web.listen-address="$prometheus" --enable-feature=exemplar-storage --log.level=warn &
prometheus-alertmanager --config.file="$out/alertmanager/alertmanager.yml" --storage.path="$out/data/alertmanager" \
    --web.listen-address="$alertmanager" --cluster.listen-address= --log.level=warn &
echo "Prometheus: http://$prometheus (Alerts, Targets)   Alertmanager: http://$alertmanager   Ctrl-C ends both"
wait -n
echo "monitoring.sh: one of them has ended (see above)" >&2
exit 1
