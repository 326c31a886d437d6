{{- define "loradock.name" -}}
{{- .Release.Name | trunc 45 | trimSuffix "-" -}}
{{- end -}}

{{- define "loradock.selector" -}}
app.kubernetes.io/name: loradock
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "loradock.labels" -}}
{{ include "loradock.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "loradock.scheme" -}}
{{- if .Values.tlsSecret }}HTTPS{{ else }}HTTP{{ end -}}
{{- end -}}

{{- define "loradock.severalServers" -}}
{{- if or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled }}true{{ end -}}
{{- end -}}

{{- /* With TLS a pod's own name would have to be in the certificate: set config.fleet_address then. */}}
{{- define "loradock.forwards" -}}
{{- if and (include "loradock.severalServers" .) (not .Values.tlsSecret) }}true{{ end -}}
{{- end -}}
