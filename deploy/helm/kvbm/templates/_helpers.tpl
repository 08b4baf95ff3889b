{{- define "kvbm.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "kvbm.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "kvbm.authSecret" -}}
{{ .Values.auth.existingSecret | default (printf "%s-auth" (include "kvbm.fullname" .)) }}
{{- end }}

{{/* What selects the pods of one part: a dict of root and part. */}}
{{- define "kvbm.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "kvbm.labels" -}}
{{ include "kvbm.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* A quantity such as 64Gi in MiB. */}}
{{- define "kvbm.mebibytes" -}}
{{- if hasSuffix "Ti" . }}{{ mul (trimSuffix "Ti" . | atoi) 1048576 }}
{{- else if hasSuffix "Gi" . }}{{ mul (trimSuffix "Gi" . | atoi) 1024 }}
{{- else }}{{ trimSuffix "Mi" . | atoi }}{{ end }}
{{- end }}

{{/* What all programs' settings have in common, as YAML. */}}
{{- define "kvbm.planes" -}}
discovery:
  discovery: {{ .Values.fleet.discovery }}
  {{- if eq .Values.fleet.discovery "etcd" }}
  etcd_url: {{ .Values.fleet.etcdUrl }}
  {{- end }}
events:
  plane: nats
  namespace: {{ .Values.fleet.namespace }}
  nats_url: {{ .Values.fleet.nats.url }}
requests:
  host: 0.0.0.0
log:
  format: json
{{- end }}

{{/* What no two pods have the same of: a dict of root, prefix (KVBM, KVBM_ROUTER) and apart. */}}
{{- define "kvbm.planesEnvironment" -}}
{{- if not .apart }}
- name: {{ .prefix }}_REQUESTS__ADVERTISE_HOST
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
{{- end }}
{{- with .root.Values.fleet.nats.secret }}
- name: {{ $.prefix }}_EVENTS__NATS_USER
  valueFrom: {secretKeyRef: {name: {{ . }}, key: user}}
- name: {{ $.prefix }}_EVENTS__NATS_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ . }}, key: password}}
{{- end }}
{{- end }}

{{/* Where a read-only container may write. */}}
{{- define "kvbm.writable" -}}
- name: HOME
  value: /tmp
- name: NUMBA_CACHE_DIR
  value: /var/cache/kvbm-kernels
{{- end }}

{{- define "kvbm.scratchMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: kernels, mountPath: /var/cache/kvbm-kernels}
{{- end }}

{{- define "kvbm.scratchVolumes" -}}
- name: tmp
  emptyDir: {}
- name: kernels
  emptyDir: {sizeLimit: 1Gi}
{{- end }}

{{- define "kvbm.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ .Values.user.uid }}
runAsGroup: {{ .Values.user.gid }}
fsGroup: {{ .Values.user.gid }}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "kvbm.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Makes directories of the node the pods' own: what the kubelet makes is root's. A dict of root,
     mounts and directories. */}}
{{- define "kvbm.prepare" -}}
- name: prepare
  image: {{ include "kvbm.image" .root }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: [install, -d, -m, "0700", -o, {{ .root.Values.user.uid | quote }}, -g, {{ .root.Values.user.gid | quote }}
    {{- range .directories }}, {{ . }}{{ end }}]
  securityContext:
    runAsNonRoot: false
    runAsUser: 0
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    capabilities: {drop: [ALL], add: [CHOWN, FOWNER]}
  resources:
    requests: {cpu: 10m, memory: 32Mi}
    limits: {memory: 32Mi}
  volumeMounts:
    {{- toYaml .mounts | nindent 4 }}
{{- end }}

{{/* What every pod has. Service links are off because a Service `kvbm-router` would otherwise be a
     variable KVBM_ROUTER_PORT, which is a setting. */}}
{{- define "kvbm.pod" -}}
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  {{- include "kvbm.podSecurity" . | nindent 2 }}
{{- end }}

{{- define "kvbm.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end }}
