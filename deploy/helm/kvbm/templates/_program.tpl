{{/* A program without a node's hardware: its settings, Deployment, Service and disruption budget. A
     dict of root, key (of the values), part (of names) and port; `own` are settings of its kind,
     `files` stand beside them, `openai` serves clients, `apart` serves no requests of programs. */}}
{{- define "kvbm.program" -}}
{{- $root := .root }}
{{- $given := index .root.Values .key }}
{{- $name := printf "%s-%s" (include "kvbm.fullname" $root) .part }}
{{- $scope := dict "root" $root "part" .part }}
{{- $prefix := printf "KVBM_%s" (.part | upper | replace "-" "_") }}
{{- $http := dict "host" "0.0.0.0" "port" .port "token" "file:/etc/kvbm-auth/token" }}
{{- $planes := include "kvbm.planes" $root | fromYaml }}
{{- if .apart }}{{ $planes = omit $planes "requests" }}{{ end }}
{{- $settings := mergeOverwrite $planes (dict "http" $http) (.own | default dict) }}
{{- $settings = mustMergeOverwrite $settings (deepCopy $given.settings) }}
{{- $drain := $given.drainSeconds | default 0 | int }}
{{- $account := include "kvbm.fullname" $root }}
{{- if eq .key "planner" }}{{ $account = printf "%s-planner" $account }}{{ end }}
apiVersion: v1
kind: ConfigMap
metadata:
  name: {{ $name }}
  labels:
    {{- include "kvbm.labels" $scope | nindent 4 }}
data:
  {{ .part }}.yaml: |
    {{- toYaml $settings | nindent 4 }}
  {{- with .files }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  labels:
    {{- include "kvbm.labels" $scope | nindent 4 }}
  {{- with ($given.service).annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  type: {{ ($given.service).type | default "ClusterIP" }}
  selector:
    {{- include "kvbm.selector" $scope | nindent 4 }}
  ports:
    - {name: http, port: {{ .port }}, targetPort: http}
    {{- if .openai }}
    - {name: openai, port: {{ $given.service.port }}, targetPort: openai}
    {{- end }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ $name }}
  labels:
    {{- include "kvbm.labels" $scope | nindent 4 }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels:
      {{- include "kvbm.selector" $scope | nindent 6 }}
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  labels:
    {{- include "kvbm.labels" $scope | nindent 4 }}
spec:
  replicas: {{ $given.replicas }}
  selector:
    matchLabels:
      {{- include "kvbm.selector" $scope | nindent 6 }}
  strategy:
    {{- if eq .key "planner" }}
    type: Recreate # two would scale against each other
    {{- else }}
    type: RollingUpdate
    rollingUpdate: {maxUnavailable: 0, maxSurge: 1}
    {{- end }}
  template:
    metadata:
      labels:
        {{- include "kvbm.selector" $scope | nindent 8 }}
      annotations:
        checksum/settings: {{ toYaml (list $settings .files) | sha256sum }}
    spec:
      serviceAccountName: {{ $account }}
      automountServiceAccountToken: {{ or (eq $root.Values.fleet.discovery "kubernetes") (eq .key "planner") }}
      {{- include "kvbm.pod" $root | nindent 6 }}
      {{- include "kvbm.placement" $given | nindent 6 }}
      topologySpreadConstraints:
        - maxSkew: 1
          topologyKey: kubernetes.io/hostname
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              {{- include "kvbm.selector" $scope | nindent 14 }}
      # Services forget the pod, what is under way ends, and some seconds.
      terminationGracePeriodSeconds: {{ add $drain 30 }}
      containers:
        - name: {{ .part }}
          image: {{ include "kvbm.image" $root }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          command: [kvbm-{{ .part }}, serve, --config, /etc/kvbm/{{ .part }}.yaml]
          env:
            {{- $own := dict "root" $root "prefix" $prefix "apart" .apart }}
            {{- include "kvbm.planesEnvironment" $own | nindent 12 }}
            {{- include "kvbm.writable" $root | nindent 12 }}
            {{- with $given.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: http, containerPort: {{ .port }}}
            {{- if .openai }}
            - {name: openai, containerPort: 8000}
            {{- end }}
          # The first start on a machine compiles kernels.
          startupProbe:
            httpGet: {path: /live, port: http}
            periodSeconds: 5
            failureThreshold: 60
          livenessProbe:
            httpGet: {path: /live, port: http}
            periodSeconds: 10
            timeoutSeconds: 5
            failureThreshold: 6
          readinessProbe:
            httpGet: {path: /ready, port: http}
            periodSeconds: 5
            timeoutSeconds: 5
          lifecycle:
            # It goes on serving until the Service sends nothing more.
            preStop:
              exec: {command: [sleep, "5"]}
          securityContext:
            {{- include "kvbm.containerSecurity" $root | nindent 12 }}
          resources:
            {{- toYaml $given.resources | nindent 12 }}
          volumeMounts:
            - {name: settings, mountPath: /etc/kvbm}
            - {name: auth, mountPath: /etc/kvbm-auth, readOnly: true}
            {{- if $given.apiKeysSecret }}
            - {name: api-keys, mountPath: /etc/kvbm-api-keys, readOnly: true}
            {{- end }}
            {{- include "kvbm.scratchMounts" $root | nindent 12 }}
            {{- with $given.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        - name: settings
          configMap: {name: {{ $name }}}
        - name: auth
          secret: {secretName: {{ include "kvbm.authSecret" $root }}, defaultMode: 0440}
        {{- with $given.apiKeysSecret }}
        - name: api-keys
          secret: {secretName: {{ . }}, defaultMode: 0440}
        {{- end }}
        {{- include "kvbm.scratchVolumes" $root | nindent 8 }}
        {{- with $given.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- end }}
