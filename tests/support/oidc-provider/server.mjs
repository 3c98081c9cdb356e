// oidc-provider on a free loopback port, as an IdP for reviewers and as an issuer of agents' tokens.
// Usage: node server.mjs PEERS_FOLDER '{"redirect_uris":["http://…/callback"]}' ; prints one line {"issuer":"http://127.0.0.1:PORT"}.
// Any name logs in (devInteractions); groups come from the name: "ana+sre+oncall" is ana of sre and oncall.
import { createServer } from 'node:http';
import { generateKeyPairSync } from 'node:crypto';
import { pathToFileURL } from 'node:url';
import { join } from 'node:path';

const [peers, optionsText = '{}'] = process.argv.slice(2);
const options = JSON.parse(optionsText);
const { Provider } = await import(pathToFileURL(join(peers, 'node_modules/oidc-provider/lib/index.js')));

const jwk = (type, extra, alg, kid) => {
  const { privateKey } = generateKeyPairSync(type, extra);
  return { ...privateKey.export({ format: 'jwk' }), use: 'sig', alg, kid };
};
const keys = [
  jwk('rsa', { modulusLength: 2048 }, 'RS256', 'rsa-1'),
  jwk('ec', { namedCurve: 'P-256' }, 'ES256', 'ec-1'),
];

const server = createServer();
await new Promise((listening) => server.listen(0, '127.0.0.1', listening));
const issuer = `http://127.0.0.1:${server.address().port}`;

const redirect_uris = options.redirect_uris ?? ['http://127.0.0.1:1/callback'];
const web = { redirect_uris, grant_types: ['authorization_code'], response_types: ['code'] };
const machine = {
  redirect_uris: [], response_types: [], grant_types: ['client_credentials'], client_secret: 'agent-secret',
};
const clients = [
  { ...web, client_id: 'reviewers', client_secret: 'reviewer-secret/+%' },
  { ...web, client_id: 'reviewers-es256', client_secret: 's', id_token_signed_response_alg: 'ES256' },
  { ...web, client_id: 'reviewers-public', token_endpoint_auth_method: 'none' },
  { ...web, client_id: 'another-app', client_secret: 's' },
  { ...machine, client_id: 'agent-7' },
];

const provider = new Provider(issuer, {
  clients,
  jwks: { keys },
  cookies: { keys: ['only a test'] },
  pkce: { required: () => true },
  scopes: ['openid', 'groups', 'run'],
  claims: { openid: ['sub'], groups: ['groups'], auth_time: null, acr: null },
  conformIdTokenClaims: false,
  findAccount: (_ctx, id) => ({
    accountId: id,
    claims: () => ({ sub: id, groups: id.split('+').slice(1) }),
  }),
  features: {
    devInteractions: { enabled: true },
    clientCredentials: { enabled: true },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (_ctx, resource) => ({
        scope: 'run',
        audience: resource.replace('#plain', ''),
        accessTokenTTL: 300,
        accessTokenFormat: 'jwt',
        jwt: { sign: { alg: 'ES256' } },
      }),
      useGrantedResource: () => true,
    },
  },
  formats: {
    customizers: {
      // A workload token as other platforms issue it: `typ` is JWT, the subject is the workload.
      jwt(_ctx, token, parts) {
        if (token.extra?.workload) {
          parts.header = { ...parts.header, typ: 'JWT' };
        }
        return parts;
      },
    },
  },
  extraTokenClaims: (ctx) => (ctx.oidc.params?.scope === 'run' ? { workload: true, team: 'ops' } : undefined),
});
provider.on('server_error', (_ctx, error) => console.error(error));
server.on('request', provider.callback());
console.log(JSON.stringify({ issuer }));
